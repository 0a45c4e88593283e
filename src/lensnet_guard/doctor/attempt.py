"""One attempt at one mechanism, in the process that was started for it."""

import json
import traceback
import warnings
from pathlib import Path

from lensnet_guard.doctor.examination import ANSWER
from lensnet_guard.doctor.outcome import Broken, NotTried, first_line


def attempt(name: str, folder: Path) -> None:
    """Try a mechanism, and leave ``answer.json`` in the folder.

    The answer is an object with ``state`` (``"holds"``, ``"fails"`` or ``"not tried"``) and
    ``detail``, in words. Whatever the mechanism raises is an answer; a process that leaves none has
    crashed.

    Args:
        name: A key of `mechanisms.MECHANISMS`.
        folder: An empty one that the attempt may write to.
    """
    state = "holds"
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        try:
            from lensnet_guard.doctor.mechanisms import MECHANISMS

            detail = MECHANISMS[name](folder)
        except NotTried as why:
            state, detail = "not tried", str(why)
        except Broken as what:
            state, detail = "fails", str(what)
        except Exception as error:
            traceback.print_exc()
            state, detail = "fails", f"{type(error).__name__}: {first_line(error)}"
    ours = {
        str(w.message) for w in warned if type(w.message).__module__.startswith("lensnet_guard")
    }
    detail = "; warned: ".join([detail, *sorted(ours)])
    (folder / ANSWER).write_text(json.dumps({"state": state, "detail": detail}))
