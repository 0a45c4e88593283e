"""``python -m lensnet_guard`` is ``lensnet-guard``."""

from lensnet_guard.cli import main

main(prog_name="lensnet-guard")
