"""CUDA graphs reuse output buffers: who made an output that is still in use, and who overwrites it.

A module compiled with CUDA graphs writes every call's outputs to the same memory. Two calls
without grad in one step, the first one's output still in use, are the pattern: torch raises an
error while it records, and in steady execution the numbers change silently. Its error names the
producer of the overwritten tensor and never the call that overwrote it; the guard knows both.
"""

import threading
import warnings
import weakref
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef

from lensnet_guard._text import add_note, explained_by
from lensnet_guard._torch_internals import (
    OF_A_GRADIENT,
    OVERWRITTEN,
    GraphTree,
    capturing,
    clones_outputs,
    compiler_options,
    graph_tree,
    is_overwritten,
)
from lensnet_guard.calls.compiled import CompileState, compile_state
from lensnet_guard.calls.record import CallRecord, Frame

_KEPT_SIGNATURES = 1_024
_KEPT_WARNINGS = 1_024
_KEPT_OVERWRITTEN = 16


class LensNetHazard(UserWarning):
    """An output of an earlier call is alive as a call starts that will overwrite it.

    Warned of once for each pair of lines. Make it an error with
    ``warnings.simplefilter("error", LensNetHazard)``.
    """


@dataclass(slots=True, eq=False)
class _Output:
    """What one call gave out, held as weakly as torch holds it.

    Attributes:
        call: The call.
        tensors: Its outputs.
        storages: The storages of its outputs, which views of them hold too.
    """

    call: CallRecord
    tensors: list[weakref.ref[torch.Tensor]]
    storages: list[Any]  # StorageWeakRef, whose methods torch gives no types

    def in_use(self, tree: GraphTree | None) -> bool:
        if tree is None:
            return not all(storage.expired() for storage in self.storages)
        # Torch keeps the outputs of a recorded graph itself, and knows whether anybody else does.
        return any(storage.cdata in tree.live for storage in self.storages)

    def can_be_read(self) -> bool:
        """Return whether somebody holds it; a tensor that was written over has no storage."""
        return self.in_use(None) or any(tensor() is not None for tensor in self.tensors)

    def is_overwritten(self) -> bool:
        held = (tensor() for tensor in self.tensors)
        tensors = (tensor for tensor in held if tensor is not None)
        return any(map(is_overwritten, (*self.storages, *tensors)))


class CompiledCalls:
    """The calls of one module, as long as it is compiled; costs next to nothing while it is not."""

    def __init__(self, module: nn.Module) -> None:
        self._module = module
        self._lock = threading.Lock()
        self._outputs: list[_Output] = []  # of the calls that share memory now
        # Those that were in use when a call wrote over them, with that call; the newest.
        self._written: deque[tuple[_Output, CallRecord]] = deque(maxlen=_KEPT_OVERWRITTEN)
        self._signatures: set[tuple[str, ...]] = set()
        self._told: set[tuple[Frame, Frame]] = set()

    def begin(self, record: CallRecord) -> CallRecord | None:
        """Note the state of compilation in ``record``, before it runs.

        Returns:
            The newest earlier call whose output this one will overwrite while it is in use.

        Warns:
            LensNetHazard: When there is one, once for each pair of lines.
        """
        if record.method is not None:
            return None  # it gives out what it likes, and whether it runs the module nobody knows
        options, captured = compiler_options(self._module), capturing()
        if options is None and not captured:
            return None
        graphs = options is not None and options.get("triton.cudagraphs") is True
        tree = self._tree() if graphs else None
        record.compiled = state = compile_state(
            cuda_graphs=graphs,
            capturing=captured,
            tree=tree,
            new_inputs=self._is_new(record.inputs),
        )
        with self._lock:
            alive = [output for output in self._outputs if output.in_use(tree)]
            self._outputs = alive
        state.live_outputs = tuple(output.call.seq for output in alive)
        if options is None or not graphs or not alive:
            return None
        if not _overwrites(record, state, alive[-1].call) or clones_outputs(options, tree):
            return None
        earlier = None
        if _is_hazard(record, state, alive[-1].call):  # else torch, or the user, says when
            earlier = alive[-1].call
            self._warn(record, earlier, marked=bool(state.marks))
        with self._lock:
            self._written += ((output, record) for output in alive)
            self._outputs = [output for output in self._outputs if output not in alive]
        return earlier

    def end(self, record: CallRecord, result: Any = None) -> None:
        """Note what the call made of it, and remember what it gave out, if it returned."""
        state = record.compiled
        if state is None:
            return
        state.end(self._tree() if state.cuda_graphs else None)
        if state.cuda_graphs:
            make: Any = StorageWeakRef  # of a storage too, for views outlive their tensor
            tensors = list(_tensors(result))
            storages = [make(tensor.untyped_storage()) for tensor in tensors]
            with self._lock:
                self._outputs.append(_Output(record, list(map(weakref.ref, tensors)), storages))

    def blame(self, error: BaseException) -> list[tuple[CallRecord, CallRecord]]:
        """Say on torch's error about an overwritten output which call made it and which wrote.

        Returns:
            Producer and overwriter of every output that it can be, each pair once.
        """
        message = str(error)
        if not self._written or OVERWRITTEN not in message:
            return []
        if OF_A_GRADIENT in message:
            name = self._written[-1][1].module
            add_note(
                error,
                f"lensnet_guard: what was overwritten is a gradient, made by a backward pass, and "
                f"no output of a call of {name}",
            )
            return []
        with self._lock:
            held = [(output, by) for output, by in self._written if output.can_be_read()]
            # Torch tells which one it is where it can; otherwise it may be any of them.
            blamed = [pair for pair in held if pair[0].is_overwritten()] or held
            self._written.clear()
        pairs = [(output.call, by) for output, by in blamed]
        for first, last in pairs:
            add_note(
                error,
                f"lensnet_guard: the output of call {first.seq} of {first.module} at "
                f"{first.caller} was overwritten by call {last.seq} at {last.caller}\n"
                f"{explained_by(_MISTAKE)}",
            )
        return pairs

    def _tree(self) -> GraphTree | None:
        parameter = next(self._module.parameters(), None)
        return graph_tree(parameter.device) if parameter is not None else None

    def _is_new(self, inputs: tuple[str, ...]) -> bool:
        if inputs in self._signatures:
            return False
        if len(self._signatures) < _KEPT_SIGNATURES:
            self._signatures.add(inputs)
        return True

    def _warn(self, record: CallRecord, earlier: CallRecord, *, marked: bool) -> None:
        lines = earlier.caller, record.caller
        if lines in self._told:
            return
        message = (
            f"{record.module}: an output of call {earlier.seq} at {earlier.caller} is still in use "
            f"as call {record.seq} at {record.caller} starts {_HOW[marked]}\n"
            f"{explained_by(_MISTAKE)}"
        )
        warnings.warn(message, LensNetHazard, stacklevel=6)
        if len(self._told) < _KEPT_WARNINGS:
            self._told.add(lines)


_MISTAKE = "overwritten-graph-outputs"
_HOW = {  # by whether cudagraph_mark_step_begin was called
    False: "without grad. The module is compiled with CUDA graphs, so the second call writes over "
    "it. Copy what is still needed, or put both calls into one batch",
    True: "after a mark in the same micro-step. The module is compiled with CUDA graphs, and "
    "cudagraph_mark_step_begin lets the second call write over it. Copy what is still needed, put "
    "both calls into one batch, or mark where the micro-step begins only",
}


def _is_hazard(record: CallRecord, state: CompileState, earlier: CallRecord) -> bool:
    """Return whether nobody can have meant a call to write over what an earlier one gave out."""
    if not state.marks:
        return not record.grad_enabled
    # A mark says that a new step begins, and frees what waits for a backward too. What is in use
    # then is a leftover of the last step, unless it was made in this very one.
    step = record.step, record.micro_step
    return step != (None, None) and step == (earlier.step, earlier.micro_step)


def _overwrites(record: CallRecord, state: CompileState, newest: CallRecord) -> bool:
    """Return whether a call starts over with the memory of those before it.

    Read from torch 2.7 to 2.15, torch/_inductor/cudagraph_trees.py (``can_start_new_generation``).
    """
    before = newest.compiled.marks if newest.compiled is not None else 0
    if state.marks:  # since the first mark, only a mark ends what shares memory
        return state.marks != before
    if state.pending_backward is None:  # unknown: outputs with grad wait for a backward
        return not record.grad_enabled
    return not state.pending_backward


def _tensors(result: Any, depth: int = 3) -> Iterator[torch.Tensor]:
    if isinstance(result, torch.Tensor):
        # A module that gives out one of its parameters gives out no buffer of a graph.
        plain = result.layout == torch.strided and not result.is_nested
        if plain and not isinstance(result, nn.Parameter):
            yield result
    elif depth and isinstance(result, (tuple, list)):
        for item in result:
            yield from _tensors(item, depth - 1)
    elif depth and isinstance(result, dict):
        yield from _tensors(list(result.values()), depth - 1)
