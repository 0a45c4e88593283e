"""What is read from torch's private API, apart from three names that `tripwire` answers to.

Each function says which torch it was read from and degrades to "unknown" where torch has changed;
tests/lensnet_guard/test_torch_internals.py fails then, so that it is noticed.
"""

import sys
from collections.abc import Callable, Iterator
from types import CodeType, FrameType
from typing import Any, TypeVar

import torch
import torch.autograd.graph
import torch.utils.checkpoint as checkpointing

_Function = TypeVar("_Function", bound=Callable[..., Any])


def _code(get: Callable[[], Any]) -> CodeType | None:
    """The code object of a private function, None when this torch has none by that name."""
    try:
        code = get().__code__
    except AttributeError:
        return None
    return code if isinstance(code, CodeType) else None


def _nested(function: Callable[[], Any], name: str) -> CodeType | None:
    """The code object of a function defined inside another."""
    outer = _code(function)
    inner = (c for c in (outer.co_consts if outer else ()) if isinstance(c, CodeType))
    return next((code for code in inner if code.co_name == name), None)


# torch 2.13, torch/utils/checkpoint.py and torch/autograd/graph.py.
_REENTRANT_FORWARD = _code(lambda: checkpointing.CheckpointFunction.forward)
_REENTRANT_BACKWARD = _code(lambda: checkpointing.CheckpointFunction.backward)
_CHECKPOINT = _code(lambda: getattr(checkpointing.checkpoint, "__wrapped__"))  # noqa: B009
_UNPACK = _nested(lambda: checkpointing._checkpoint_hook.__init__, "unpack_hook")
_ENGINE = _code(lambda: torch.autograd.graph._engine_run_backward)
_STOP_RECOMPUTING = getattr(checkpointing, "_StopRecomputationError", None)

_graph_task = getattr(torch._C, "_current_graph_task_id", lambda: -1)
_saved_tensor_hooks = getattr(torch._C._autograd, "_top_saved_tensors_default_hooks", lambda _: ())
_grad_enabled = torch.is_grad_enabled


def backward_pass() -> int | None:
    """A number for the running backward pass of this thread; None outside one."""
    number: int = _graph_task()
    return None if number == -1 else number


def may_be_in_checkpoint() -> bool:
    """Whether a checkpoint's forward may be running: a quick look before `open_checkpoints`."""
    # Reentrant checkpoints run under no_grad, the other kind under saved-tensor hooks.
    return not _grad_enabled() or _saved_tensor_hooks(True) is not None


def open_checkpoints(frame: FrameType | None) -> Iterator[object]:
    """The activation checkpoints whose forward runs from ``frame`` outwards, innermost first.

    The objects are torch's own for those checkpoints; `recomputed_checkpoint` finds the same again.
    What lies outside a running backward pass or recompute does not count.
    """
    while frame is not None:
        code = frame.f_code
        if code is _ENGINE or code is _UNPACK or code is _REENTRANT_BACKWARD:
            return
        checkpoint = None
        if code is _REENTRANT_FORWARD:
            checkpoint = frame.f_locals.get("ctx")
        elif code is _CHECKPOINT:
            suspended = getattr(frame.f_locals.get("gen"), "gi_frame", None)
            checkpoint = suspended.f_locals.get("new_frame") if suspended is not None else None
        if checkpoint is not None:
            yield checkpoint
        frame = frame.f_back


def recomputed_checkpoint(frame: FrameType | None) -> object | None:
    """The activation checkpoint that is being recomputed from ``frame`` outwards, if any.

    The innermost frame of torch's decides: a hook that runs inside backward is no recompute, even
    when that backward was started by a (reentrant) checkpoint's.
    """
    while frame is not None:
        code = frame.f_code
        if code is _ENGINE:
            return None
        if code is _UNPACK:
            return frame.f_locals.get("frame")
        if code is _REENTRANT_BACKWARD:
            return frame.f_locals.get("ctx")
        frame = frame.f_back
    return None


def recomputing(frame: FrameType | None) -> bool:
    """Whether some activation checkpoint is being recomputed from ``frame`` outwards.

    Not only inside backward: reading a saved tensor of the graph recomputes too.
    """
    return recomputed_checkpoint(frame) is not None


def stops_recomputing(error: BaseException) -> bool:
    """Whether an exception only says that a checkpoint has recomputed all that it needs."""
    return _STOP_RECOMPUTING is not None and isinstance(error, _STOP_RECOMPUTING)


def uses_cuda_graphs(module: torch.nn.Module) -> bool:
    """Whether a module is compiled (``module.compile``) with CUDA graphs.

    Read from torch 2.13, torch/_dynamo/eval_frame.py: the compiled call keeps its configuration.
    """
    compiled = getattr(module, "_compiled_call_impl", None)
    if compiled is None:
        return False
    config = getattr(compiled, "get_compiler_config", None)
    options = config() if config is not None else None
    return isinstance(options, dict) and options.get("triton.cudagraphs") is True


def mark_counter() -> int:
    """How often ``torch.compiler.cudagraph_mark_step_begin`` was called; 0 where unknown."""
    trees = sys.modules.get("torch._inductor.cudagraph_trees")
    box = getattr(trees, "MarkStepBox", None)
    return int(getattr(box, "mark_step_counter", 0))


def eager_only(reason: str) -> Callable[[_Function], _Function]:
    """Keep a function, and all that it calls, out of torch.compile's graphs.

    As ``torch.compiler.disable`` does, but without its wrapper's cost on every eager call and
    without importing torch._dynamo (read from torch 2.13, torch/_dynamo/eval_frame.py).

    Args:
        reason: what torch prints where the function stands in the way of a full graph.
    """

    def mark(function: _Function) -> _Function:
        try:
            frames = torch._C._dynamo.eval_frame
            skip = frames._FrameAction.SKIP
            frames.set_code_exec_strategy(
                function.__code__,
                frames._FrameExecStrategy(skip, skip),
            )
        except (AttributeError, TypeError):
            disable: Any = torch.compiler.disable
            return disable(function, reason=reason)  # type: ignore[no-any-return]
        function._torchdynamo_disable = True  # type: ignore[attr-defined]
        function._torchdynamo_disable_msg = reason  # type: ignore[attr-defined]
        return function

    return mark
