"""The ledger of one micro-step."""

# Blocks that end with an error are what is tested here, so `with` statements nest and do much.

import sys
import threading

import pytest

from lensnet_guard import LensNetViolation, MicroStep
from lensnet_guard.calls.record import CallRecord


def record(seq=1):
    return CallRecord(seq, 1, "m", "call", "allow", None, "training", "a", 0, 0, "t", True)


def violation(text="refused"):
    return LensNetViolation(text, record())


class TestSpending:
    def test_nothing_is_spent_at_first(self):
        """Due scopes are listed with no call."""
        ledger = MicroStep(3, 1, {"a": 1, "b": 2})
        assert (ledger.step, ledger.micro_step) == (3, 1)
        assert ledger.spent("a") == []
        assert ledger.calls == {"a": 0, "b": 0}
        assert ledger.unmet() == {"a": (0, 1), "b": (0, 2)}

    def test_spend(self):
        """Each call is booked on its own scope, oldest first."""
        ledger = MicroStep(0, 0, {"a": 1, "b": 2})
        calls = [record(1), record(2), record(3)]
        for scope, call in zip("bab", calls, strict=True):
            ledger.spend(scope, call)
        assert ledger.spent("b") == [calls[0], calls[2]]
        assert ledger.calls == {"a": 1, "b": 2}
        assert ledger.unmet() == {}

    def test_a_scope_that_is_not_due(self):
        """In inference nothing is due; calls are counted all the same."""
        ledger = MicroStep(0, 0, {})
        ledger.spend("a", record())
        assert ledger.calls == {"a": 1}
        assert ledger.unmet() == {}

    def test_asking_changes_nothing(self):
        """To ask what a scope has spent does not enter it in the books."""
        ledger = MicroStep(0, 0, {"a": 1})
        ledger.spent("never")
        ledger.calls["a"] = 99
        assert ledger.calls == {"a": 0}

    def test_reading_while_another_thread_spends_failed(self):
        """The calls can be read at any time: reading takes one look, however many scopes come."""
        ledger = MicroStep(0, 0, {})
        failures = []
        spending = threading.Event()
        spending.set()

        def read():
            while spending.is_set():
                try:
                    ledger.unmet()
                except RuntimeError as error:
                    failures.append(error)
                    return

        interval = sys.getswitchinterval()
        sys.setswitchinterval(1e-6)
        reader = threading.Thread(target=read)
        reader.start()
        try:
            for number in range(3_000):
                ledger.spend(str(number), record())
        finally:
            spending.clear()
            reader.join()
            sys.setswitchinterval(interval)
        assert failures == []
        assert len(ledger.calls) == 3_000


class TestSwallowed:
    def test_nothing_to_raise(self):
        """Without violations nothing happens."""
        ledger = MicroStep(0, 0, {})
        ledger.raise_swallowed()
        assert ledger.violations == []

    def test_raises_the_first_violation_itself(self):
        """The very same object comes out, not a copy, however often."""
        ledger = MicroStep(0, 0, {})
        ledger.violations += [violation("first"), violation("second")]
        for _ in range(2):
            with pytest.raises(LensNetViolation, match="first") as caught:
                ledger.raise_swallowed()
            assert caught.value is ledger.violations[0]


class TestNotes:
    def notes_on(self, error, *violations):
        ledger = MicroStep(0, 0, {})
        ledger.violations += violations
        ledger.note_swallowed(error)
        return getattr(error, "__notes__", [])

    def test_first_line_of_the_first_violation(self):
        """An unrelated exception tells of the violation that came before it."""
        notes = self.notes_on(ValueError(), violation("headline.\n  details"), violation("second"))
        assert notes == ["Before this, a LensNetViolation was swallowed: headline."]

    def test_none_without_violations(self):
        """A clean micro-step adds nothing to anybody's exception."""
        assert self.notes_on(ValueError()) == []

    def test_none_on_the_violation_itself(self):
        """A violation on its way out was not swallowed."""
        mine = violation()
        assert self.notes_on(mine, mine) == []

    @pytest.mark.parametrize("link", ["__cause__", "__context__"])
    def test_none_on_an_error_that_shows_the_violation_already(self, link):
        """An exception that was raised from the violation says enough by itself."""
        mine, middle, outer = violation(), ValueError(), KeyError()
        setattr(middle, link, mine)
        setattr(outer, link, middle)
        assert self.notes_on(outer, mine) == []

    def test_an_error_that_is_its_own_cause_hung_the_guard(self):
        """A circle of causes ends the search instead of going round forever."""
        one, two = ValueError(), KeyError()
        one.__cause__, two.__cause__ = two, one
        worker = threading.Thread(target=self.notes_on, args=(one, violation()), daemon=True)
        worker.start()
        worker.join(timeout=10)
        assert not worker.is_alive()
        assert len(one.__notes__) == 1

    def test_nested_blocks_told_the_same_twice(self):
        """The scope and its micro-step tell of a violation once."""
        error, mine = ValueError(), violation()
        self.notes_on(error, mine)
        assert len(self.notes_on(error, mine)) == 1

    def test_raise_from_none_hid_the_violation(self):
        """Where the traceback leaves the violation out, the note is needed."""
        for hidden_by in (None, KeyError()):
            error, mine = ValueError(), violation()
            error.__context__ = mine
            error.__cause__ = hidden_by
            assert len(self.notes_on(error, mine)) == 1
