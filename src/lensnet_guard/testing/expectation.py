"""What a test expects of a module's calls, and the words in which it fails."""

import os
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass
from types import TracebackType
from typing import Any, get_args

import pytest

from lensnet_guard._text import count
from lensnet_guard.calls.record import Context
from lensnet_guard.guard import Guard, guard_of
from lensnet_guard.testing.capture import CapturedCalls, capture, list_calls


@dataclass(frozen=True, kw_only=True)
class Expectation:
    """How many calls there must be.

    Args:
        exact: This many; or else give ``min``, or ``max``, or both.
        min: At least this many.
        max: At most this many.
        context: Count the calls of this context only.
        scope: Count the calls of this scope only.
        guard: A guard, a guarded module, or None for every guard of the process.
        info: Text for the message of a failure.

    Raises:
        TypeError: A number that is none, a scope that is no name, a guard that is none.
        ValueError: Numbers that cannot be, or a context that there is not.
    """

    exact: int | None = None
    min: int | None = None
    max: int | None = None
    context: Context | None = None
    scope: str | None = None
    guard: Any = None
    info: str | None = None

    def __post_init__(self) -> None:
        for name in ("exact", "min", "max"):
            bound = getattr(self, name)
            if bound is not None and (isinstance(bound, bool) or not isinstance(bound, int)):
                raise TypeError(f"{name} must be a number of calls, not {bound!r}")
            if bound is not None and bound < 0:
                raise ValueError(f"{name} must not be negative, and is {bound}")
        if (self.exact is None) == (self.min is None and self.max is None):
            raise ValueError("expect either an exact number of calls, or min or max or both")
        if self.min is not None and self.max is not None and self.min > self.max:
            raise ValueError(f"at least {self.min} and at most {self.max} calls cannot be")
        if self.context not in (None, *get_args(Context)):
            raise ValueError(f'context must be "training" or "inference", not {self.context!r}')
        if self.scope is not None and not isinstance(self.scope, str):
            raise TypeError(f"scope must be a name, not {self.scope!r}")
        if self.guard is not None and not isinstance(self.guard, Guard):
            found = guard_of(self.guard)
            if found is None:
                raise TypeError(
                    f"guard must be a Guard or a guarded module, not {type(self.guard).__name__}"
                )
            object.__setattr__(self, "guard", found)

    def watch(self) -> AbstractContextManager[CapturedCalls]:
        """Capture the calls that count."""
        return capture(self.guard, context=self.context, scope=self.scope)

    def failure(self, calls: CapturedCalls, *, full_stacks: bool) -> str | None:
        """Return what is wrong with these calls, or None when they are as expected."""
        low = self.exact if self.exact is not None else self.min or 0
        high = self.exact if self.exact is not None else self.max
        if low <= len(calls) and (high is None or len(calls) <= high):
            return None
        got = f"got {len(calls)}:" if calls else "got none."
        lines = [f"expected {self._bounds()}{self._filter()}, {got}"]
        if calls:
            lines.append(list_calls(calls, full_stacks=full_stacks))
        if calls.others:
            lines.append(f"Other calls, in another context or scope: {calls.others}.")
        if os.environ.get("LENSNET_GUARD") == "off":
            lines.append("LENSNET_GUARD is off: guards without a mode of their own record nothing.")
        if self.info is not None:
            lines.append(str(self.info))
        return "\n".join(lines)

    def _bounds(self) -> str:
        if self.exact is not None:
            return f"exactly {count(self.exact, 'call')}" if self.exact else "no call"
        if self.max is None:
            return f"at least {count(self.min or 0, 'call')}"
        if self.min is None:
            return f"at most {count(self.max, 'call')}"
        return f"{self.min} to {count(self.max, 'call')}"

    def _filter(self) -> str:
        text = f" of {self.guard.name}" if self.guard is not None else ""
        text += f" in {self.context}" if self.context is not None else ""
        return text + (f" in scope {self.scope}" if self.scope is not None else "")


class Asserted:
    """``with Asserted(config, exact=1) as calls:`` fails the test when it ends.

    A class and no generator, so that none of its frames stands in pytest's traceback.
    """

    def __init__(self, config: pytest.Config, **expected: Any) -> None:
        __tracebackhide__ = True
        try:
            self._expected = Expectation(**expected)
        except (TypeError, ValueError) as error:
            raise type(error)(*error.args) from None  # without the frames that found it
        self._full_stacks = config.get_verbosity() > 0
        self._watch = ExitStack()

    def __enter__(self) -> CapturedCalls:
        self._calls = self._watch.enter_context(self._expected.watch())
        return self._calls

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        __tracebackhide__ = True
        self._watch.close()
        if kind is None:
            failure = self._expected.failure(self._calls, full_stacks=self._full_stacks)
            if failure is not None:
                pytest.fail(failure)
