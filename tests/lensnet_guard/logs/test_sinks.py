"""Whoever wants to be told of calls and violations, by the public face alone."""

import pytest

from lensnet_guard import BudgetUnmet, RankDivergence, Sink, guard_module


class Told(Sink):
    """Writes down what it is told."""

    def __init__(self):
        self.lines = []

    def begin(self, record):
        self.lines.append(f"begin {record.seq}")

    def end(self, record):
        self.lines.append(f"end {record.seq}")

    def violation(self, error):
        self.lines.append(type(error).__name__)

    def settled(self, ledger):
        self.lines.append(f"settled {ledger.calls}")

    def micro_step(self, module, context, ledger):
        self.lines.append(f"micro-step of {module} in {context}, {ledger.raised}")


@pytest.fixture
def told(guard):
    told = Told()
    guard.add_sink(told)
    return told


def score(guard, x):
    with guard.context("training"), guard.sanctioned("preference_scorer"):
        guard.module(x)


class TestSink:
    def test_is_told_until_it_is_removed(self, guard, told, x):
        """Of a call, and of the micro-step that it settles."""
        score(guard, x)
        guard.remove_sink(told)
        score(guard, x)
        assert told.lines == [
            "begin 1",
            "end 1",
            "settled {'preference_scorer': 1}",
            "micro-step of Scorer in training, None",
        ]

    def test_only_what_has_ended_well_is_settled(self, guard, told, x):
        """Neither a missed budget, nor a body that raised, nor inference."""
        with guard.context("training"):
            with pytest.raises(BudgetUnmet), guard.micro_step():
                pass
            with pytest.raises(KeyError), guard.micro_step():
                raise KeyError
        with guard.context("inference"), guard.micro_step():
            guard.module(x)
        assert told.lines == [
            "BudgetUnmet",
            "micro-step of Scorer in training, None",
            "micro-step of Scorer in training, KeyError",
            "begin 2",
            "end 2",
            "micro-step of Scorer in inference, None",
        ]

    @pytest.mark.parametrize("mode", ["observe", "off"])
    def test_where_nothing_is_raised_calls_may_be_missing(self, scorer, mode):
        """A settled micro-step says which."""
        guard, unmet = guard_module(scorer, mode=mode), []

        class Asks(Sink):
            def settled(self, ledger):
                unmet.append(ledger.unmet())

        guard.add_sink(Asks())
        with guard.context("training"), guard.micro_step():
            pass
        assert unmet == [{"preference_scorer": (0, 1)}]

    def test_what_it_raises_as_it_is_told_of_a_settled_micro_step(self, guard, x):
        """It leaves the block, and the micro-step was broken off by it."""
        told = Told()

        class Strict(Sink):
            def settled(self, ledger):
                raise RuntimeError("not alike")

        guard.add_sink(Strict())
        guard.add_sink(told)
        with pytest.raises(RuntimeError, match="not alike"):
            score(guard, x)
        assert told.lines[2:] == ["micro-step of Scorer in training, RuntimeError"]


class TestViolate:
    @pytest.mark.parametrize("mode", ["enforce", "observe", "off"])
    def test_what_other_code_has_found(self, scorer, mode):
        """A violation like any other: recorded, told to sinks, and raised where that is on."""
        guard, told = guard_module(scorer, mode=mode), Told()
        guard.add_sink(told)
        if mode == "enforce":
            with pytest.raises(RankDivergence, match=r"hangs what they do together: seven\."):
                guard.violate("RankDivergence", " seven")
        else:
            guard.violate("RankDivergence", " seven")
        assert told.lines == ["RankDivergence"] * (mode != "off")
        assert [record.reason for record in guard.violations] == told.lines

    @pytest.mark.parametrize("mode", ["enforce", "observe", "off"])
    def test_no_such_violation(self, scorer, mode):
        """Is refused before anything is recorded."""
        guard, told = guard_module(scorer, mode=mode), Told()
        guard.add_sink(told)
        with pytest.raises(ValueError, match=r"^'Oops' is no violation; there are Uns"):
            guard.violate("Oops", ": seven")
        assert (guard.violations, told.lines) == ((), [])
