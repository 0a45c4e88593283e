"""What is read from torch's private API, apart from three names that `tripwire` answers to.

Each function says which torch it was read from and degrades to "unknown" where torch has changed;
tests/lensnet_guard/test_torch_internals.py fails then, so that it is noticed.
"""

import sys
from collections.abc import Callable, Mapping
from datetime import timedelta
from inspect import signature
from typing import Any, NamedTuple, TypeVar

import torch
import torch.autograd.profiler as _profiler
from torch.multiprocessing.reductions import StorageWeakRef

_Function = TypeVar("_Function", bound=Callable[..., Any])


def compiler_options(module: torch.nn.Module) -> Mapping[str, object] | None:
    """How a module was compiled: None when it was not, empty where its backend does not tell.

    Read from torch 2.13, torch/nn/modules/module.py and torch/_dynamo/eval_frame.py: a module
    compiled in place keeps a function that tells, a wrapper made by ``torch.compile`` tells itself.
    """
    in_place: Any = module._compiled_call_impl
    tell = getattr(in_place, "get_compiler_config", vars(module).get("get_compiler_config"))
    options = tell() if tell is not None else None
    if isinstance(options, Mapping):
        return options
    return None if in_place is None and tell is None else {}


def mark_counter() -> int:
    """How often ``torch.compiler.cudagraph_mark_step_begin`` was called; 0 where unknown.

    Read from torch 2.13, torch/_inductor/cudagraph_trees.py, as are the next two.
    """
    box = getattr(_loaded("torch._inductor.cudagraph_trees"), "MarkStepBox", None)
    return abs(int(getattr(box, "mark_step_counter", 0)))


def generation() -> int | None:
    """Torch's number of compiled calls so far: outputs of an older one may be overwritten."""
    tracker = getattr(_loaded("torch._dynamo.mutation_guard"), "GenerationTracker", None)
    number = getattr(tracker, "generation", None)
    return number if isinstance(number, int) else None


class GraphTree(NamedTuple):
    """The CUDA graphs of one device, as this thread runs them.

    Attributes:
        phase: what ran last: ``"warmup"``, ``"recording"``, ``"execution"``, or ``"none"``.
        pending_backward: a forward waits for its backward: until then no output is overwritten.
        live: outputs of the calls that share memory now and that are in use, each by the ``cdata``
            of a weak reference to its storage.
    """

    phase: str
    pending_backward: bool
    live: frozenset[int]


def graph_tree(device: torch.device) -> GraphTree | None:
    """The graphs that torch has recorded for a device; None where there are none, or unknown."""
    trees: Any = _loaded("torch._inductor.cudagraph_trees")
    if trees is None or device.index is None:
        return None
    try:
        containers = trees.get_obj(trees.local, "tree_manager_containers")
        manager = containers[device.index].tree_manager
        return GraphTree(
            manager.path_state.name.lower(),
            bool(manager.running_forwards_with_pending_backwards),
            frozenset(manager.live_cudagraph_pool_storages_in_curr_execution()),
        )
    except (AttributeError, KeyError):
        return None


def is_overwritten(storage: StorageWeakRef) -> bool:
    """Whether torch refuses to read a storage, because a later run has written over it."""
    try:
        found: Any = torch.UntypedStorage._new_with_weak_ptr(storage.cdata)
        if found is not None:
            found.data_ptr()
    except RuntimeError as error:
        return OVERWRITTEN in str(error)
    except AttributeError:
        pass
    return False


OVERWRITTEN = "has been overwritten by a subsequent run"  # what torch's error says


def compile_counters() -> tuple[int, int]:
    """Graphs that torch has compiled so far in this process, and CUDA graphs that it skipped.

    Read from torch 2.13, torch/_dynamo/output_graph.py and torch/_inductor/cudagraph_utils.py.
    """
    counters = getattr(_loaded("torch._dynamo.utils"), "counters", {})
    stats, inductor = counters.get("stats", {}), counters.get("inductor", {})
    return stats.get("unique_graphs", 0), inductor.get("cudagraph_skips", 0)


def default_store(prefix: str) -> Any:
    """What all ranks of torch.distributed read and write, under a prefix; None where unknown.

    A connection of its own: one that another thread waits on is locked. Read from torch 2.13,
    torch/distributed/distributed_c10d.py.
    """
    try:
        distributed: Any = torch.distributed
        store = distributed.distributed_c10d._get_default_store().clone()
        store.set_timeout(timedelta(seconds=5))  # one that has vanished is waited for no longer
        return distributed.PrefixStore(prefix, store)
    except (AttributeError, RuntimeError):
        return None


def capturing() -> bool:
    """Whether the user captures a CUDA graph: its replays will run no Python."""
    # A build with CUDA on a machine without a driver raises when it is asked for the stream.
    initialized: bool = torch.cuda.is_initialized()  # type: ignore[no-untyped-call]
    return initialized and torch.cuda.is_current_stream_capturing()


def profiling() -> bool:
    """Whether a torch profiler is taking a trace, in whatever thread; False where unknown.

    Read from torch 2.13, torch/autograd/profiler.py: a flag of the process, which holds for NVTX
    and ITT too. The one that C++ tells is the thread's own, and stays down with
    ``profile_all_threads``.
    """
    flag: bool = getattr(_profiler, "_is_profiler_enabled", False)
    return flag


def _loaded(module: str) -> object | None:
    """A module of torch's if something has imported it: the guard must not, they are large."""
    return sys.modules.get(module)


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
            why = {"reason": reason} if "reason" in signature(disable).parameters else {}
            return disable(function, **why)  # type: ignore[no-any-return]
        function._torchdynamo_disable = True  # type: ignore[attr-defined]
        function._torchdynamo_disable_msg = reason  # type: ignore[attr-defined]
        return function

    return mark
