"""Putting a guard on: `guard_module` for one module, `lensnet_guard` around an owner."""

import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any, get_args

import torch
from torch import nn

from lensnet_guard.boundary.armed_class import armed_by
from lensnet_guard.boundary.proxy import is_proxy
from lensnet_guard.boundary.tripwire import runs
from lensnet_guard.calls.callers import check_caller_exists
from lensnet_guard.calls.policy import CallPolicy, Mode
from lensnet_guard.guard import Guard, M, guard_of

_MISSING = object()


def guard_module(
    module: M,
    *,
    policy: CallPolicy | None = None,
    mode: Mode | None = None,
    log: str | os.PathLike[str] | None = None,
    name: str | None = None,
    guard_copies: bool = True,
) -> Guard[M]:
    """Guard a module: call ``guard.module`` from now on, never the raw module.

    Args:
        module: The raw module; it is changed in place, and given back by ``guard.uninstall()``.
        policy: The contract; the default allows one ``"preference_scorer"`` call per micro-step.
        mode: ``"enforce"`` (default), ``"observe"`` or ``"off"``; the environment variable
            LENSNET_GUARD decides when the argument is not given.
        log: Folder for the JSONL log.
        name: How records and messages call the module; its class name by default.
        guard_copies: Whether deep copies and pickles of the guarded module have a guard of their
            own, with the same contract; otherwise they are raw. A process that is spawned with it
            has it guarded in any case.

    Returns:
        The guard, whose ``module`` passes for the raw one.

    Raises:
        TypeError: Not a module, or one that has no forward (a ModuleList) and of which the policy
            counts neither methods nor parts; a policy, name or log of another type.
        ValueError: An unknown mode, a module that is guarded already, or a policy with a caller,
            method or submodule that there is not.
    """
    if policy is not None and not isinstance(policy, CallPolicy):
        raise TypeError(f"policy must be a CallPolicy, not {policy!r}")
    _check_module(module, policy or CallPolicy())
    if name is not None and not isinstance(name, str):
        raise TypeError(f"name must be a string, not {name!r}")
    chosen = _resolve_mode(mode)
    if policy is not None and chosen != "off":
        for scope in policy.in_full.values():
            if scope.caller is not None:
                check_caller_exists(scope.caller, early=True)
    called = name or type(module).__name__
    guard = Guard(module, policy or CallPolicy(), chosen, called, guard_copies=guard_copies)
    if log is not None and guard.mode != "off":
        try:
            guard.start_log(log)
        except BaseException:
            guard.uninstall()
            raise
    return guard


def _check_module(module: object, policy: CallPolicy) -> None:
    """Refuse what cannot be guarded."""
    guard = guard_of(module)
    if guard is not None:
        raise ValueError(f"{guard.name} is guarded already; use its guard: guard_of(module)")
    if not isinstance(module, nn.Module):
        raise TypeError(f"only an nn.Module can be guarded, not {type(module).__name__}")
    if isinstance(module, torch.jit.ScriptModule):
        raise TypeError(
            f"{module.original_name} is TorchScript, which runs without Python: a call behind its "
            "guard's back could not be seen. Guard the module that it was made from"
        )
    tripwire = armed_by(module)
    if tripwire is not None:
        raise ValueError(
            f"this {type(module).__name__} is part of a {type(tripwire.module).__name__} that is "
            "guarded already; guard the part first, and then the whole"
        )
    called = runs(module) or type(module).__call__ is not nn.Module.__call__
    if not (called or policy.methods or policy.parts):
        raise TypeError(
            f"a {type(module).__name__} has no forward, so there is no call of it to count. Guard "
            "the modules in it one by one, or name what is called of it in "
            "CallPolicy(methods=..., parts=...)"
        )


@contextmanager
def lensnet_guard(
    owner_or_module: Any,
    *,
    attribute: str = "lensnet",
    policy: CallPolicy | None = None,
    mode: Mode | None = None,
    log: str | os.PathLike[str] | None = None,
) -> Iterator[Guard]:
    """Guard ``owner.lensnet`` (or any module) for the duration of the block.

    On a foreign owner the proxy is installed on entry and the very same module restored on exit.
    An owner that holds a guarded module already, as ``MCController`` does, keeps its guard; the
    block adds the log and the final verdict.

    Args:
        owner_or_module: An object with the module as ``attribute``, or the module itself.
        attribute: The name by which the owner holds the module.
        policy: The contract, as for `guard_module`.
        mode: ``"enforce"``, ``"observe"`` or ``"off"``, as for `guard_module`.
        log: Folder for the JSONL log, as for `guard_module`.

    Yields:
        The guard.

    Raises:
        TypeError: Neither a module nor an owner of one.
        ValueError: Another policy or mode than the existing guard's, or a second log.

    Warns:
        RuntimeWarning: At the end, if violations were recorded and nothing was raised.
    """
    name, module = _find_module(owner_or_module, attribute)
    guard = guard_of(module)
    own = guard is None
    if guard is None:
        guard = guard_module(module, policy=policy, mode=mode)
    elif policy not in (None, guard.policy) or mode not in (None, guard.mode):
        raise ValueError(
            f"{guard.name} is guarded already, in mode {guard.mode!r} with {guard.policy}; "
            "lensnet_guard cannot change that, leave policy and mode out"
        )
    installed: AbstractContextManager[None] = nullcontext()
    if name is not None and guard.mode != "off" and not is_proxy(module):
        installed = _installed(owner_or_module, name, module, guard.module)
    before = guard.violation_count
    logging = False
    try:
        if log is not None and guard.mode != "off":
            guard.start_log(log)
            logging = True
        with installed:
            yield guard
    finally:
        if own:
            guard.uninstall()
        elif logging:
            guard.end_log()
    if guard.violation_count > before:
        _warn_of_violations(guard, guard.violation_count - before)


def _warn_of_violations(guard: Guard, number: int) -> None:
    last = guard.violations[-1]
    warnings.warn(
        f"lensnet_guard: {number} violations of {guard.name}'s "
        f"contract were recorded and none left this block; the last is {last.reason} "
        f"at {last.caller}",
        RuntimeWarning,
        stacklevel=4,
    )


def _find_module(owner_or_module: Any, attribute: str) -> tuple[str | None, Any]:
    """``(attribute, module)``, or ``(None, module)`` when the module itself was given."""
    module = getattr(owner_or_module, attribute, _MISSING)
    if isinstance(module, nn.Module):
        return attribute, module
    # A model whose lensnet is None has not built it yet; it is no bare module.
    if isinstance(owner_or_module, nn.Module) and attribute == "lensnet" and module is _MISSING:
        return None, owner_or_module
    raise TypeError(
        f"lensnet_guard needs an nn.Module, or an owner whose attribute {attribute!r} is one; "
        f"{type(owner_or_module).__name__}.{attribute} is "
        + ("missing" if module is _MISSING else f"a {type(module).__name__}")
    )


@contextmanager
def _installed(owner: Any, attribute: str, raw: nn.Module, proxy: nn.Module) -> Iterator[None]:
    """The proxy in the owner's place; afterwards the owner exactly as it was."""
    own = attribute in getattr(owner, "__dict__", ())
    hidden = own and isinstance(owner, nn.Module)  # in its dict, so that it is no submodule
    put: Callable[[str, nn.Module], None]
    put = vars(owner).__setitem__ if hidden else partial(setattr, owner)
    put(attribute, proxy)
    try:
        yield
    finally:
        if getattr(owner, attribute, None) is not proxy:
            warnings.warn(
                f"lensnet_guard: {type(owner).__name__}.{attribute} was replaced inside the block, "
                "so calls of the new object were not guarded; it is left in place",
                RuntimeWarning,
                stacklevel=5,
            )
        elif not own and attribute in getattr(owner, "__dict__", ()):
            delattr(owner, attribute)  # it hid one that the owner inherits from its class
        else:
            put(attribute, raw)


def _resolve_mode(mode: Mode | None) -> Mode:
    source = "mode" if mode is not None else "the environment variable LENSNET_GUARD"
    chosen = mode if mode is not None else os.environ.get("LENSNET_GUARD") or "enforce"
    for known in get_args(Mode):
        if chosen == known:
            return known  # type: ignore[no-any-return]
    raise ValueError(f"{source} must be one of {', '.join(get_args(Mode))}, not {chosen!r}")
