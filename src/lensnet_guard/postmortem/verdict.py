"""The verdict on a run, from its log files alone."""

import json
import os
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class LogVerdict:
    """What a run folder's logs say.

    Attributes:
        module: the guarded module's name.
        micro_steps: training micro-steps that ended.
        calls: training calls that were allowed, in micro-steps that ended.
        inference_calls: calls in inference context.
        violations: violations of any kind.
        cut_off_calls: training calls in micro-steps that never ended, because the process died.
        calls_per_micro_step: calls of each training micro-step, in log order.
        unreadable_lines: lines that are no JSON object, such as the last one of a killed process.
        lost_lines: lines that a run reported as not written.
        ended: whether every log file ends with ``run.end``; a killed process leaves none, nor does
            one whose disk was full.
    """

    module: str
    micro_steps: int
    calls: int
    inference_calls: int
    violations: int
    cut_off_calls: int
    calls_per_micro_step: tuple[int, ...]
    unreadable_lines: int
    lost_lines: int
    ended: bool

    @property
    def clean(self) -> bool:
        """No violation, no line lost, and the log goes on to the end of the run."""
        return self.ended and not (self.violations or self.lost_lines)

    def __str__(self) -> str:
        text = ", ".join(
            (
                _count(self.micro_steps, "micro-step"),
                _count(self.calls, f"{self.module} call"),
                _count(self.violations, "violation"),
            )
        )
        extras = {
            "inference call": self.inference_calls,
            "cut-off call": self.cut_off_calls,
            "unreadable line": self.unreadable_lines,
            "lost line": self.lost_lines,
        }
        text += "".join(f"; {_count(n, what)}" for what, n in extras.items() if n)
        return text if self.ended else f"{text}; the log stops before the end of the run"

    def to_json(self) -> dict[str, Any]:
        """The verdict as a JSON-ready object, without the list of calls per micro-step."""
        fields = asdict(self)
        del fields["calls_per_micro_step"]
        return fields | {"clean": self.clean}


def read_verdict(folder: str | os.PathLike[str]) -> LogVerdict:
    """Read every ``lensnet.rank*.jsonl`` of a run folder.

    Raises:
        FileNotFoundError: there is no log in the folder.
    """
    paths = sorted(Path(folder).glob("lensnet.rank*.jsonl"))
    if not paths:
        raise FileNotFoundError(f"no lensnet.rank*.jsonl in {folder}")
    module = "LensNet"
    per_micro_step: list[int] = []
    calls = inference_calls = violations = cut_off = unreadable = lost = 0
    ended = True
    for path in paths:
        last_event = None
        open_calls = 0  # calls since the last micro-step ended
        for line in _objects(path):
            event = line.get("event")
            last_event = event or last_event
            if event is None:
                unreadable += 1
            elif event == "run.begin":
                module = str(line.get("module", module))
                cut_off, open_calls = cut_off + open_calls, 0
            elif event == "call.begin" and line.get("verdict") == "allow":
                if line.get("kind") == "recompute":
                    continue
                if line.get("context") == "training":
                    open_calls += 1
                else:
                    inference_calls += 1
            elif event == "violation":
                violations += 1
            elif event == "micro_step.end" and line.get("context") == "training":
                per_micro_step.append(sum(line.get("calls", {}).values()))
                calls, open_calls = calls + open_calls, 0
            elif event == "run.end":
                lost += int(line.get("lost_lines", 0))
        cut_off += open_calls
        ended = ended and last_event == "run.end"
    return LogVerdict(
        module=module,
        micro_steps=len(per_micro_step),
        calls=calls,
        inference_calls=inference_calls,
        violations=violations,
        cut_off_calls=cut_off,
        calls_per_micro_step=tuple(per_micro_step),
        unreadable_lines=unreadable,
        lost_lines=lost,
        ended=ended,
    )


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"


def _objects(path: Path) -> Iterator[dict[str, Any]]:
    """The file's lines, an empty object for each that is none; lines are read one at a time."""
    with path.open("rb") as lines:
        for line in lines:
            try:
                parsed = json.loads(line)
            except ValueError:
                parsed = None
            yield parsed if isinstance(parsed, dict) else {}
