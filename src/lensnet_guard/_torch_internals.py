"""What is read from torch's private API, but for checkpoints and a few names of the tripwire's.

Each function says which torch it was read from. Where torch has changed it answers "unknown", and
`UntestedTorch` says once what cannot be told apart any more.
"""

import sys
from collections.abc import Callable, Iterable, Mapping
from datetime import timedelta
from inspect import signature
from operator import attrgetter
from types import FrameType
from typing import Any, NamedTuple, TypeVar

import torch
import torch.autograd.profiler as _profiler
from torch.multiprocessing.reductions import StorageWeakRef

from lensnet_guard.untested import UntestedTorch, tell_untested

_Function = TypeVar("_Function", bound=Callable[..., Any])

_COMPILED_IN_PLACE = "_compiled_call_impl"
_PROFILING = "_is_profiler_enabled"
_TREES = "torch._inductor.cudagraph_trees"


def losses() -> list[str]:
    """Return what is missing of that which torch has from its import on; empty if nothing is."""
    told = []
    if not hasattr(torch.nn.Module, _COMPILED_IN_PLACE):
        told.append(f"whether a module is compiled (nn.Module.{_COMPILED_IN_PLACE} is gone)")
    if not hasattr(_profiler, _PROFILING):
        told.append(f"whether a profiler runs ({_profiler.__name__}.{_PROFILING} is gone)")
    return told


def _tell(loss: str) -> None:
    """Tell a loss in the midst of a call: where warnings are errors, on stderr."""
    try:
        tell_untested([loss])
    except UntestedTorch as told:
        print(told, file=sys.stderr)


def _read(module: str, path: str, unknown: Any, loss: str) -> Any:
    """Return a name of a module of torch's that is loaded; importing one takes long.

    Args:
        module: The module's full name.
        path: The name in it, with dots where it is the attribute of another.
        unknown: The answer where the module is not loaded, or the name is gone.
        loss: What cannot be told without the name.

    Warns:
        UntestedTorch: The module is there and the name is not.
    """
    found = sys.modules.get(module)
    if found is None:
        return unknown
    for name in path.split("."):
        if not hasattr(found, name):
            _tell(f"{loss} ({module}.{path} is gone)")
            return unknown
        found = getattr(found, name)
    return found


def compiler_options(module: torch.nn.Module) -> Mapping[str, object] | None:
    """Return how a module was compiled: None if it was not, empty where its backend does not tell.

    Read from torch 2.7 to 2.15, torch/nn/modules/module.py and torch/_dynamo/eval_frame.py: a
    module compiled in place keeps a function that tells, a wrapper made by ``torch.compile`` tells
    itself, and so does a compiled forward on the instance, which the guard has wrapped.
    """
    in_place: Any = getattr(module, _COMPILED_IN_PLACE, None)
    tell = getattr(in_place, "get_compiler_config", vars(module).get("get_compiler_config"))
    if tell is None and (forward := vars(module).get("forward")) is not None:
        behind = getattr(forward, "__dict__", {}).get("__wrapped__", forward)
        own = (getattr(f, "__dict__", {}).get("get_compiler_config") for f in (forward, behind))
        tell = next(filter(None, own), None)  # in its dict: a mock answers to every name
    if tell is None:
        if in_place is None:
            return None
        _tell("how a module is compiled (get_compiler_config is gone)")
        return {}
    options = tell()
    return options if isinstance(options, Mapping) else {}


def mark_counter() -> int:
    """Return how often ``torch.compiler.cudagraph_mark_step_begin`` was called; 0 where unknown.

    Read from torch 2.7 to 2.15, torch/_inductor/cudagraph_trees.py.
    """
    loss = "whether steps of CUDA graphs are marked"
    return abs(int(_read(_TREES, "MarkStepBox.mark_step_counter", 0, loss)))


def generation() -> int | None:
    """Return torch's number of compiled calls so far: outputs of an older one may be overwritten.

    Read from torch 2.7 to 2.15, torch/_dynamo/mutation_guard.py.
    """
    loss = "the number of a compiled call"
    number = _read("torch._dynamo.mutation_guard", "GenerationTracker.generation", None, loss)
    return number if isinstance(number, int) else None


class GraphTree(NamedTuple):
    """The CUDA graphs of one device, as this thread runs them.

    Attributes:
        phase: What ran last: ``"warmup"``, ``"recording"``, ``"execution"``, or ``"none"``.
        pending_backward: A forward waits for its backward: until then no output is overwritten.
        live: Outputs of the calls that share memory now and that are in use, each by the ``cdata``
            of a weak reference to its storage.
        cloned: Those that are in use are copied before their memory is used again.
    """

    phase: str
    pending_backward: bool
    live: frozenset[int]
    cloned: bool = False


def graph_tree(device: torch.device) -> GraphTree | None:
    """Return the graphs that torch has recorded for a device; None if there are none, or unknown.

    Read from torch 2.7 to 2.15, torch/_inductor/cudagraph_trees.py.
    """
    trees: Any = sys.modules.get(_TREES)
    if trees is None or device.index is None:
        return None
    try:
        containers = trees.get_obj(trees.local, "tree_manager_containers")
        manager = containers[device.index].tree_manager
        return GraphTree(
            manager.path_state.name.lower(),
            bool(manager.running_forwards_with_pending_backwards),
            frozenset(manager.live_cudagraph_pool_storages_in_curr_execution()),
            any(
                getattr(node, "user_visible_output_idxs", ())  # since torch 2.14, where asked for
                for node in getattr(manager.current_node, "_path_from_root", ())
            ),
        )
    except KeyError:
        return None
    except AttributeError as error:
        _tell(f"what CUDA graphs do with outputs ({_TREES}: {error})")
        return None


def is_overwritten(output: torch.Tensor | StorageWeakRef) -> bool:
    """Return whether torch refuses to read an output, because a later run has written over it.

    Torch takes the storage from the tensors that a call gave out, and marks one that views of them
    still hold: hence both are asked (read from torch 2.7 to 2.15, ``dealloc_current_path_weakrefs``
    of torch/_inductor/cudagraph_trees.py, and seen on a GPU with 2.11).
    """
    try:
        found: Any = output
        if not isinstance(output, torch.Tensor):
            found = torch.UntypedStorage._new_with_weak_ptr(output.cdata)  # noqa: SLF001  # no other way
        if found is not None:
            found.data_ptr()
    except RuntimeError as error:
        return OVERWRITTEN in str(error)
    except AttributeError as error:
        _tell(f"which output was overwritten ({error})")
    return False


# What torch's error says; the second since torch 2.14, of what a backward pass gave out.
OVERWRITTEN = "has been overwritten by a subsequent run"
OF_A_GRADIENT = "gradient tensor output"


def clones_outputs(options: Mapping[str, object], tree: GraphTree | None) -> bool:
    """Return whether outputs that are in use are copied before a call would write over them.

    As with ``cudagraph_trees_generation_cloning="user_visible"``, read from torch 2.14 and 2.15,
    torch/_inductor/config.py; before there was no such thing.

    Args:
        options: Of the compiled module, as they were when it was compiled.
        tree: Tells it of the graphs that were recorded, where there are any.
    """
    if tree is not None:
        return tree.cloned
    option = "cudagraph_trees_generation_cloning"
    now = getattr(sys.modules.get("torch._inductor.config"), "triton", None)
    return "user_visible" in (options.get(f"triton.{option}"), getattr(now, option, None))


def compile_counters() -> tuple[int, int]:
    """Return how many graphs torch has compiled so far, and how many CUDA graphs it skipped.

    Read from torch 2.7 to 2.15, torch/_dynamo/output_graph.py and
    torch/_inductor/cudagraph_utils.py.
    """
    counters = _read("torch._dynamo.utils", "counters", {}, "which call compiles anew")
    stats, inductor = counters.get("stats", {}), counters.get("inductor", {})
    return stats.get("unique_graphs", 0), inductor.get("cudagraph_skips", 0)


def default_store(prefix: str) -> Any:
    """Return what all ranks of torch.distributed read and write, under a prefix; None if unknown.

    A connection of its own: one that another thread waits on is locked. Read from torch 2.7 to
    2.15, torch/distributed/distributed_c10d.py.
    """
    try:
        distributed: Any = torch.distributed
        default = distributed.distributed_c10d._get_default_store()  # noqa: SLF001  # nor here
        store = _connection(default)
        store.set_timeout(timedelta(seconds=5))  # one that has vanished is waited for no longer
        return distributed.PrefixStore(prefix, store)
    except RuntimeError:
        return None
    except AttributeError as error:
        _tell(f"what other ranks do ({error})")
        return None


def _connection(store: Any) -> Any:
    """Connect once more to what a store is connected to, as torch 2.7's cannot do themselves."""
    if hasattr(store, "clone"):
        return store.clone()
    distributed: Any = torch.distributed
    while isinstance(store, distributed.PrefixStore):
        store = store.underlying_store
    return distributed.TCPStore(store.host, store.port, wait_for_workers=False)


def capturing() -> bool:
    """Return whether the user captures a CUDA graph: its replays will run no Python."""
    # A build with CUDA on a machine without a driver raises when it is asked for the stream.
    initialized: bool = torch.cuda.is_initialized()  # type: ignore[no-untyped-call]
    return initialized and torch.cuda.is_current_stream_capturing()


def profiling() -> bool:
    """Return whether a torch profiler is taking a trace, in whatever thread; False where unknown.

    Read from torch 2.7 to 2.15, torch/autograd/profiler.py: a flag of the process, which holds for
    NVTX and ITT too. The one that C++ tells is the thread's own, and stays down with
    ``profile_all_threads``.
    """
    flag: bool = getattr(_profiler, _PROFILING, False)
    return flag


_SUPER = "torch._dynamo.variables.misc"


def looks_up_super(frame: FrameType) -> bool:
    """Return whether torch.compile asks whether classes are equal, to find where ``super()`` goes.

    It looks for a class among the bases of a module's, and must not take one that passes for it.
    Read from torch 2.7 to 2.15, torch/_dynamo/variables/misc.py; elsewhere it would never end.
    """
    module = sys.modules.get(_SUPER)
    return module is not None and frame.f_code.co_filename == module.__file__


def eager_only(reason: str) -> Callable[[_Function], _Function]:
    """Keep a function, and all that it calls, out of torch.compile's graphs.

    As ``torch.compiler.disable`` does, but without its wrapper's cost on every eager call and
    without importing torch._dynamo (read from torch 2.7 to 2.15, torch/_dynamo/eval_frame.py).

    Args:
        reason: What torch prints where the function stands in the way of a full graph.
    """

    def mark(function: _Function) -> _Function:
        try:
            frames: Any = torch._C._dynamo.eval_frame  # noqa: SLF001  # importing it takes seconds
            skip = frames._FrameAction.SKIP  # noqa: SLF001
            strategy = frames._FrameExecStrategy(skip, skip)  # noqa: SLF001
            frames.set_code_exec_strategy(function.__code__, strategy)
        except (AttributeError, TypeError):
            disable: Any = torch.compiler.disable
            why = {"reason": reason} if "reason" in signature(disable).parameters else {}
            return disable(function, **why)  # type: ignore[no-any-return]
        marked: Any = function
        marked._torchdynamo_disable = True  # noqa: SLF001  # what torch's own wrapper sets
        marked._torchdynamo_disable_msg = reason  # noqa: SLF001
        return function

    return mark


# What modules are made of, and who has written to it ----------------------------------------------


def _unknown_writes(_: torch.Tensor) -> int:
    _tell("whether a tensor was written to (Tensor._version is gone)")
    return 0


# How often a tensor was written to in place, as torch counts it for backward: the same for all of
# its views. Raises for one that was made in inference mode. Read from torch 2.7 to 2.15,
# torch/csrc/autograd/python_variable.cpp.
writes_to: Callable[[torch.Tensor], int] = (
    attrgetter("_version") if hasattr(torch.Tensor, "_version") else _unknown_writes
)


def holders(module: torch.nn.Module) -> tuple[Mapping[str, Any], ...] | None:
    """Return the dicts in which a module keeps parameters, buffers and submodules; None if unknown.

    One of TorchScript's may have none. Read from torch 2.7 to 2.15, torch/nn/modules/module.py.
    """
    found = vars(module)
    kept = tuple(found.get(name) for name in ("_parameters", "_buffers", "_modules"))
    return None if None in kept else kept  # type: ignore[return-value]


def transient_buffers(module: torch.nn.Module) -> Iterable[str]:
    """Return the names of a module's own buffers that its state dict leaves out; none if unknown.

    Read from torch 2.7 to 2.15, torch/nn/modules/module.py.
    """
    names: Iterable[str] = vars(module).get("_non_persistent_buffers_set", ())
    return names


def _named_children(module: torch.nn.Module) -> Mapping[str, torch.nn.Module]:
    return dict(module.named_children())


# A module's submodules by name, and None where one is missing: the dict itself, because `modules()`
# costs eight times as much. Read from torch 2.7 to 2.15, torch/nn/modules/module.py.
submodules: Callable[[torch.nn.Module], Mapping[str, torch.nn.Module | None]] = (
    attrgetter("_modules") if hasattr(torch.nn.Module(), "_modules") else _named_children
)
