"""Execution: an admitted call runs, and everybody is told before and after."""

import time
from collections.abc import Callable
from typing import Any

from torch import nn

from lensnet_guard._torch_checkpoints import stops_recomputing
from lensnet_guard.boundary.forwards import own_forward
from lensnet_guard.boundary.hazards import CompiledCalls
from lensnet_guard.boundary.inside import Inside
from lensnet_guard.boundary.profiling import in_range
from lensnet_guard.calls.record import CallRecord
from lensnet_guard.logs.history import History


class Execution:
    """Runs the calls of one module.

    Args:
        module: The raw module.
        history: It knows who is told.
        inside: It says that a thread is inside an admitted run.

    Attributes:
        compiled: The calls of the module as long as it is compiled.
        replaced: Whether a call has run another forward than the class's.
    """

    def __init__(self, module: nn.Module, history: History, inside: Inside) -> None:
        self.compiled = CompiledCalls(module)
        self.replaced = False
        self._module = module
        self._history = history
        self._inside = inside

    def run(
        self,
        record: CallRecord,
        run: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        note: Callable[[Any], None] | None = None,
    ) -> Any:
        """Run the module.

        Args:
            record: Of the call; it takes note of how it ends.
            run: What to run.
            args: The arguments by position.
            kwargs: The arguments by name.
            note: It is told what the call returns, for what the log says of its end.

        Returns:
            What the module returns.
        """
        inside, sinks = self._inside, self._history.sinks
        already_inside, running = inside.here, None
        own = own_forward(self._module) if "forward" in self._module.__dict__ else None
        start = time.perf_counter()
        try:
            earlier = self.compiled.begin(record)
            for sink in sinks:
                sink.begin(record)
                if earlier is not None:
                    sink.hazard(record, earlier)
            if note is not None:
                record.notes = {}  # they are written
            inside.here = True
            if own is not None:
                running, inside.running, self.replaced = inside.running, own, True
            result = in_range(record, run)(*args, **kwargs)
            self.compiled.end(record, result)
            record.outcome = "returned"
            if note is not None:
                note(result)
        except BaseException as error:
            stopped = stops_recomputing(error)
            record.outcome = "stopped early" if stopped else f"raised {type(error).__name__}"
            self.compiled.end(record)
            self._history.name_log(error)
            raise
        finally:
            inside.here = already_inside
            if own is not None:
                inside.running = running
            record.duration_ms = (time.perf_counter() - start) * 1e3
            for sink in sinks:
                sink.end(record)
        return result
