"""Activation checkpoints of torch, as they are seen from the stack below them.

Torch's own functions are known by the files that its public ones are in, and a checkpoint by the
kind of object that it is: one of a class of those files, which torch holds while it runs the
checkpoint's forward and while it runs that again. Names of private functions and variables, which
change from one torch to the next, are not what a frame is known by. Read from torch 2.7, 2.9, 2.11,
2.13, 2.14 and 2.15: torch/utils/checkpoint.py, torch/autograd/graph.py and
torch/distributed/_composable/checkpoint_activation.py.
"""

import inspect
import os
import sys
from collections.abc import Iterable, Iterator
from types import CodeType, FrameType, FunctionType, GeneratorType
from typing import Any, Literal
from weakref import ReferenceType

import torch
import torch.autograd.graph
import torch.utils.checkpoint as checkpointing
from torch import nn
from torch.autograd.function import FunctionCtx
from torch.utils._python_dispatch import TorchDispatchMode

from lensnet_guard.untested import is_tested

_C: Any = torch._C  # noqa: SLF001  # for two functions that torch shows nowhere else

# What the guard reads by a private name, and what it cannot tell without. The first is used for
# this alone: with another class in its place, checkpoints may be other objects than expected.
# Without hooks (which torch 2.7 does not show) nothing is lost, only every stack is looked through.
_NAMES: tuple[tuple[Any, str, str], ...] = (
    (checkpointing, "_CheckpointFrame", "which call a checkpoint runs again"),
    (_C, "_current_graph_task_id", "one backward pass from the next"),
)


def losses() -> list[str]:
    """Return what this torch does not let the guard tell of checkpoints; empty if all is known."""
    missing = [(o, name, loss) for o, name, loss in _NAMES if not hasattr(o, name)]
    told = [f"{loss} ({owner.__name__}.{name} is gone)" for owner, name, loss in missing]
    if not is_tested():
        told.append("a call that torch's checkpoints add in backward from one that they repeat")
    return told


def _file(module: str) -> str:
    """Return the source of a module of torch's, whoever has replaced functions in it meanwhile."""
    return str(sys.modules[module].__file__)


# By file, and not by what stands there now: many a script sets torch.utils.checkpoint.checkpoint.
_FILES = frozenset((_file(checkpointing.__name__),))


def _public() -> Iterator[CodeType | None]:
    """Yield the public functions of torch under which a checkpoint's forward runs."""
    for name in ("checkpoint", "checkpoint_sequential"):
        yield getattr(inspect.unwrap(getattr(checkpointing, name)), "__code__", None)
    yield getattr(checkpointing.CheckpointFunction.forward, "__code__", None)


_FORWARD = frozenset(code for code in _public() if code and code.co_filename in _FILES)
_UTILS = os.path.dirname(os.path.abspath(torch.__file__)) + os.sep + "utils" + os.sep
# The engine is started from these, whatever its private starter is called.
_ENGINE_FILES = frozenset((_file("torch.autograd"), _file("torch.autograd.graph")))
_MODULE_FILE = _file(nn.Module.__module__)
_COMPOSABLE = "torch.distributed._composable.checkpoint_activation"

_Role = Literal["engine", "checkpoints", "module"]


class _Roles(dict[str, _Role | None]):
    """Knows what a source file is of torch, by one look-up for each frame of a stack."""

    def __missing__(self, file: str) -> _Role | None:
        role: _Role | None = None
        if file in _ENGINE_FILES:
            role = "engine"
        elif file == _MODULE_FILE:
            role = "module"
        elif file in _FILES or "checkpoint" in file.removeprefix(_UTILS) != file:
            role = "checkpoints"
        return self.setdefault(file, role)


_roles = _Roles()
_graph_task = getattr(_C, "_current_graph_task_id", None)
_autograd = getattr(_C, "_autograd", None)
_hooks_on_top = getattr(_autograd, "_top_saved_tensors_default_hooks", None)
_grad_enabled = torch.is_grad_enabled


def backward_pass() -> int | None:
    """Return a number for this thread's running backward pass; None outside one, or unknown."""
    number: int = _graph_task() if _graph_task is not None else -1
    return None if number == -1 else number


def may_be_recomputing() -> bool:
    """Return whether a checkpoint may be running again, before `recomputed_checkpoint` is asked."""
    # Outside a backward pass it does when a saved tensor is read; then under hooks of its own.
    return _graph_task is None or _graph_task() != -1 or _saved_tensor_hooks() is not None


def may_be_in_checkpoint() -> bool:
    """Return whether a checkpoint's forward may be running, before `open_checkpoints` is asked."""
    # Reentrant checkpoints run under no_grad, the other kind under saved-tensor hooks.
    return not _grad_enabled() or _saved_tensor_hooks() is not None


def open_checkpoints(frame: FrameType | None) -> list[object]:
    """Return torch's objects for the checkpoints whose forward runs from ``frame`` outwards.

    `recomputed_checkpoint` finds the same again. What lies outside a running backward pass or
    recompute does not count.
    """
    found = list(_behind_hooks())
    composable = _COMPOSABLE in sys.modules
    while frame is not None:
        role = _roles[frame.f_code.co_filename]
        if role == "engine":
            break
        if role == "checkpoints":
            if frame.f_code in _FORWARD:
                found += _held(frame)
            elif not _runs_forward(frame) and _held(frame):
                break  # a recompute
            found += _started(frame.f_locals.values())
        elif role == "module" and composable:
            found += _started(_composable_state(frame.f_locals.get("self")))
        frame = frame.f_back
    return list({id(checkpoint): checkpoint for checkpoint in found}.values())


def recomputed_checkpoint(frame: FrameType | None) -> tuple[object, ...] | None:
    """Return what torch holds of the checkpoint that is being run again from ``frame`` outwards.

    Not only inside backward: reading a saved tensor of the graph recomputes too. The innermost
    frame of torch's decides: a hook that runs inside backward is no recompute, even when that
    backward was started by a (reentrant) checkpoint's.

    Returns:
        None where nothing is. One of the objects is the checkpoint; none at all in a torch that
        does not show it, where the guard knows no more than that torch's checkpoints run this call.
    """
    unexplained = False
    while frame is not None:
        role = _roles[frame.f_code.co_filename]
        if role == "engine":
            break
        if role == "checkpoints":
            if frame.f_code in _FORWARD or _runs_forward(frame):
                unexplained = False
            elif held := _held(frame):
                return held
            else:
                unexplained = True
        frame = frame.f_back
    running = _graph_task is None or _graph_task() != -1
    return () if unexplained and running and losses() else None


def stops_recomputing(error: BaseException) -> bool:
    """Return whether an exception only says that a checkpoint has recomputed all that it needs."""
    public = getattr(checkpointing, "CheckpointError", ())
    return _is_of_checkpoints(type(error)) and not isinstance(error, public)


def is_composable(module: nn.Module) -> bool:
    """Return whether torch's composable checkpoint is applied to a module.

    It opens inside the module's call, so that nothing shows it as that call is admitted.
    """
    return _COMPOSABLE in sys.modules and bool(_composable_state(module))


def _saved_tensor_hooks() -> Any:
    return _hooks_on_top(True) if _hooks_on_top is not None else ()


def _is_of_checkpoints(cls: type) -> bool:
    """Return whether a class is defined where torch's checkpoints are."""
    module = sys.modules.get(cls.__module__)
    return _roles[getattr(module, "__file__", None) or ""] == "checkpoints"


def _is_checkpoint(value: object) -> bool:
    """Return whether a value is what torch keeps of one checkpoint."""
    if isinstance(value, FunctionCtx):
        return True
    # Modes that save or find selected results may serve several checkpoints.
    return _is_of_checkpoints(type(value)) and not (
        callable(value) or isinstance(value, TorchDispatchMode)
    )


def _held(frame: FrameType) -> tuple[object, ...]:
    return tuple(value for value in frame.f_locals.values() if _is_checkpoint(value))


def _generators(values: Iterable[object]) -> "Iterator[GeneratorType[Any, Any, Any]]":
    """Yield the generators that torch suspends while the forward of a checkpoint runs."""
    for value in values:
        if isinstance(value, GeneratorType) and _roles[value.gi_code.co_filename] == "checkpoints":
            yield value


def _started(values: Iterable[object]) -> Iterator[object]:
    """Yield the checkpoints that such generators among some values have begun."""
    for generator in _generators(values):
        if generator.gi_frame is not None:
            yield from _held(generator.gi_frame)


def _runs_forward(frame: FrameType) -> bool:
    """Return whether a function of torch's has a checkpoint begun, whose forward it runs."""
    return any(True for _ in _generators(frame.f_locals.values()))


def _behind_hooks() -> Iterator[object]:
    """Yield the checkpoint whose forward has put up the saved-tensor hooks that are on top."""
    for hook in _saved_tensor_hooks() or ():
        if isinstance(hook, FunctionType) and _roles[hook.__code__.co_filename] == "checkpoints":
            for cell in hook.__closure__ or ():
                # A recompute has hooks too; they refer weakly to the checkpoint that runs again.
                if not isinstance(cell.cell_contents, ReferenceType):
                    yield from filter(_is_checkpoint, (cell.cell_contents,))


def _composable_state(module: object) -> tuple[object, ...]:
    """Return what torch's composable checkpoint keeps on a module, in a dict of its own."""
    if not isinstance(module, nn.Module):
        return ()
    kept = (value for value in vars(module).values() if isinstance(value, dict))
    states = (s for by in kept for s in by.values() if type(s).__module__ == _COMPOSABLE)
    return tuple(value for state in states for value in vars(state).values())
