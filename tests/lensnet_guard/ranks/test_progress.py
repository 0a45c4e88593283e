"""What a rank has done: counts, and words."""

import re
import threading

import pytest
import torch
from torch import nn

from lensnet_guard import CallPolicy, CallRecord, MicroStep, Scope, Sink, guard_module
from lensnet_guard.ranks.progress import Count, Progress

NUMBERED, STANDING_ALONE = MicroStep(7, 2, {}), MicroStep(None, None, {})


class Noting(Sink):
    """Tells a progress of the calls, and keeps what it says in the midst of one."""

    def __init__(self, progress: Progress, *, compared: bool = True) -> None:
        self._progress, self.compared = progress, compared
        self.said = ""

    def begin(self, record: CallRecord) -> None:
        self._progress.begin(0, record, compared=self.compared)
        self.said = str(self._progress.state())


@pytest.fixture
def progress() -> Progress:
    return Progress(["A", "B"])


class TestCounts:
    def test_the_first_of_modules_stands_for_all(self, progress: Progress) -> None:
        """Whose micro-steps end together, however often."""
        ended = [progress.end_micro_step(module, NUMBERED) for module in (1, 0, 0, 1, 1)]
        assert ended == [1, None, 2, None, 3]
        assert progress.count() == Count(1, False, 3, (0, 0), 7, 2, False)

    def test_a_micro_step_without_a_number(self, progress: Progress) -> None:
        """That of a scope which stands alone."""
        progress.end_micro_step(0, STANDING_ALONE)
        assert progress.count()[4:6] == (-1, -1)

    def test_what_is_compared_changes_no_more(self, progress: Progress) -> None:
        """Until all have come; then the next window begins."""
        standing = progress.stand(leaving=True)
        assert standing == Count(1, True, 0, (0, 0), -1, -1, True)
        progress.end_micro_step(0, NUMBERED)
        assert progress.count() == standing
        progress.go_on()
        assert progress.count() == Count(2, False, 1, (0, 0), 7, 2, False)


class TestWords:
    def test_nothing_yet(self, progress: Progress) -> None:
        """No calls, and a line of the thread that made it."""
        text = str(progress.state())
        assert text.startswith(
            "0 A, 0 B training calls in 0 micro-steps; called from nowhere; is in no call, at "
        )
        assert text.endswith("in TestWords.test_nothing_yet") or "in test_nothing_yet" in text

    def test_a_few_of_many_modules(self, progress: Progress) -> None:
        """The others are counted together."""
        assert progress.state().in_words([1]).startswith("0 B, 0 of 1 others training calls in 0")

    def test_a_call_that_is_not_compared(self) -> None:
        """It has a number like any other, and adds nothing to what must be equal."""
        guard = guard_module(nn.Linear(1, 1), policy=CallPolicy({"s": Scope((0, 9))}), name="A")
        sink = Noting(Progress(["A"]), compared=False)
        guard.add_sink(sink)
        with guard.context("training"), guard.sanctioned("s"):
            guard.module(torch.ones(1, 1))
            guard.module(torch.ones(1, 1))
        assert sink.said.startswith("0 training calls in 0 micro-steps; called from ")
        assert "; has been in call 2 of A for 0 s, at " in sink.said

    def test_inside_a_call(self) -> None:
        """Its number, and the line of the thread that makes it; afterwards it is in none."""
        guard = guard_module(nn.Linear(1, 1), policy=CallPolicy({"s": Scope((0, 9))}), name="A")
        progress = Progress(["A"])
        sink = Noting(progress)
        guard.add_sink(sink)

        def call() -> None:
            with guard.context("training"), guard.sanctioned("s"):
                guard.module(torch.ones(1, 1))

        thread = threading.Thread(target=call)
        thread.start()
        thread.join()
        call()
        assert re.fullmatch(
            r"2 training calls in 0 micro-steps; called from \S+test_progress.py:\d+ in \S*call; "
            r"has been in call 2 of A for 0 s, at \S+test_progress.py:\d+ in \S+",
            sink.said,
        ), sink.said
        assert "; is in no call, at " in str(progress.state())
