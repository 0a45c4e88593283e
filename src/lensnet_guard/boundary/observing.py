"""What a guard tells that only observes, of what it would refuse if it were to enforce."""

import sys
import warnings
from collections.abc import Callable


def teller() -> Callable[[str], None]:
    """Return what tells of things that are let through, each once.

    Observing never raises: where warnings are errors, they are told on stderr.
    """
    told: set[str] = set()

    def tell(message: str) -> None:
        if message in told:
            return
        told.add(message)
        text = f"lensnet_guard: {message}. In observe mode it is let through"
        try:
            warnings.warn(text, RuntimeWarning, stacklevel=4)
        except RuntimeWarning as error:
            print(error, file=sys.stderr)

    return tell
