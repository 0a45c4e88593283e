"""What torch tells about compilation and CUDA graphs around a call of a compiled module.

A crash in a CUDA graph is explained by what nobody sees from outside: which outputs were still in
use, whether a backward was pending, whether this call was the one that compiled or captured anew.
"""

import operator
from dataclasses import dataclass, field
from typing import Any

from lensnet_guard import _schema
from lensnet_guard._torch_internals import (
    GraphTree,
    compile_counters,
    generation,
    mark_counter,
)


@dataclass(slots=True)
class CompileState:
    """The state of things as a call of a compiled module began, and what the call made of it.

    Attributes:
        cuda_graphs: The module is compiled with CUDA graphs.
        capturing: The caller captures a CUDA graph of its own. The call ran once, for the capture;
            no replay will be seen.
        generation: Torch's number of compiled calls so far; None where unknown.
        marks: How often ``torch.compiler.cudagraph_mark_step_begin`` was called.
        pending_backward: A forward waits for its backward, until when no output is overwritten;
            None where unknown.
        new_inputs: No earlier call of the module had inputs of these shapes, dtypes and devices.
        live_outputs: ``seq`` of the earlier calls an output of which was in use.
        phase: What torch's CUDA graphs did in the call: ``"warmup"``, ``"recording"`` or
            ``"replay"``; None before its end, and where there are none.
        graphs_compiled: Graphs that torch compiled during the call, in any thread; None before its
            end.
        cuda_graphs_skipped: Functions that torch runs without CUDA graphs since this call, although
            asked to; None before its end.
    """

    cuda_graphs: bool
    capturing: bool
    generation: int | None
    marks: int
    pending_backward: bool | None
    new_inputs: bool
    live_outputs: tuple[int, ...] = ()
    phase: str | None = None
    graphs_compiled: int | None = None
    cuda_graphs_skipped: int | None = None
    _counters: tuple[int, int] = field(default=(0, 0), repr=False)

    def end(self, tree: GraphTree | None) -> None:
        """Note that the call has returned or raised, and what torch tells now."""
        compiled, skipped = compile_counters()
        self.graphs_compiled = max(0, compiled - self._counters[0])
        self.cuda_graphs_skipped = max(0, skipped - self._counters[1])
        if tree is not None and tree.phase in _PHASES:
            self.phase = _PHASES[tree.phase]

    def to_log(self) -> dict[str, Any]:
        """Return the state as JSON-ready fields."""
        return dict(zip(_schema.COMPILE_STATE, _get_logged(self), strict=True))


_get_logged = operator.attrgetter(*_schema.COMPILE_STATE)
_PHASES = {"warmup": "warmup", "recording": "recording", "execution": "replay"}


def compile_state(
    *, cuda_graphs: bool, capturing: bool, tree: GraphTree | None, new_inputs: bool
) -> CompileState:
    """Return the state as a call begins."""
    return CompileState(
        cuda_graphs,
        capturing,
        generation(),
        mark_counter(),
        tree.pending_backward if tree is not None else None,
        new_inputs,
        _counters=compile_counters(),
    )
