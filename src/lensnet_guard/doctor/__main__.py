"""``python -m lensnet_guard.doctor MECHANISM FOLDER`` tries one mechanism, for `examination`."""

import sys
from pathlib import Path

from lensnet_guard.doctor.attempt import attempt

attempt(sys.argv[1], Path(sys.argv[2]))
