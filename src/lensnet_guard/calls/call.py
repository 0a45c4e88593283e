"""A call as conditions see it: while it runs, with its arguments, which no record keeps."""

import inspect
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from lensnet_guard.calls.record import CallRecord, Context


@dataclass(slots=True, eq=False)
class Call:
    """One call, as a condition is asked about it; a condition must not keep it.

    Attributes:
        module: The raw module.
        method: What is called of it: ``"forward"``, or a method or part that the policy names.
        function: The bound method or part itself, by whose signature arguments have names.
        args: The arguments by position.
        kwargs: The arguments by name.
        context: ``"training"``, ``"inference"`` or None.
        scope: The scope that the call belongs to; None while that is being found out.
        earlier: The call of the module that was admitted before this one, if there was one.
        result: What the call has returned, for a condition in ``ensures``.
        memory: What conditions remember of the module from call to call. It is its guard's, and
            goes with it; a key is the condition that remembers.
    """

    module: torch.nn.Module
    method: str
    function: Any
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    context: "Context | None"
    scope: str | None = None
    earlier: "CallRecord | None" = None
    result: Any = None
    memory: dict[Any, Any] = field(default_factory=dict, repr=False)
    _bound: dict[str, Any] | None = field(default=None, repr=False)

    @property
    def grad_enabled(self) -> bool:
        """Whether autograd records."""
        return torch.is_grad_enabled()

    def argument(self, name: str) -> Any:
        """Return an argument, whether it was given by position or by name.

        Raises:
            LookupError: The call has no such argument.
        """
        if name in self.kwargs:
            return self.kwargs[name]
        if self._bound is None:
            signature = inspect.signature(self.function)
            self._bound = dict(signature.bind_partial(*self.args, **self.kwargs).arguments)
        if name not in self._bound:
            raise LookupError(f"the call has no argument {name!r}, only {sorted(self._bound)}")
        return self._bound[name]
