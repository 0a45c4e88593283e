"""The violations: their exact text, and that they survive pickling with all evidence."""

# Blocks that end with an error are what is tested here, so `with` statements nest and do much.

import contextlib
import copy
import multiprocessing
import os
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from lensnet_guard import (
    BudgetExceeded,
    BudgetUnmet,
    BypassedGuard,
    CallPolicy,
    ContextSwitchRefused,
    LensNetViolation,
    NoContext,
    ReentrantCall,
    UnsanctionedCall,
    guard_module,
)
from lensnet_guard.calls.errors import build_violation
from lensnet_guard.calls.record import CallRecord

HERE = Path(__file__).resolve()


@pytest.fixture(autouse=True)
def _at_the_root(monkeypatch):
    """Paths in messages are relative to the working directory: let that be the repository."""
    monkeypatch.chdir(HERE.parents[3])


def here(offset):
    """``file:line in function`` of the calling test, ``offset`` lines on."""
    frame = sys._getframe(1)
    name = getattr(frame.f_code, "co_qualname", frame.f_code.co_name)
    return f"{HERE.relative_to(Path.cwd())}:{frame.f_lineno + offset} in {name}"


def called_from(caller, record):
    """The "called from" rows: the given caller, and the two frames around it from the record."""
    assert str(record.caller) == caller
    stack = record.stack()
    first = stack.index(record.caller)
    around = [str(frame) for frame in stack[first + 1 : first + 3]]
    assert len(around) == 2
    return [f"  called from  {caller}", *(f"               {frame}" for frame in around)]


def violate_unsanctioned(guard, x):
    with guard.context("training"):
        guard.module(x)


def violate_exceeded(guard, x):
    with guard.context("training"), guard.sanctioned("preference_scorer"):
        guard.module(x)
        guard.module(x)


def violate_unmet(guard, x):
    with guard.context("training"), guard.micro_step(3, 1):
        pass


def violate_no_context(guard, x):
    guard.module(x)


def violate_reentrant(guard, x):
    hook = guard.module.linear.register_forward_hook(lambda *_: guard.module(x))
    try:
        with guard.context("inference"):
            guard.module(x)
    finally:
        hook.remove()


def violate_switch(guard, x):
    with guard.context("training"), guard.micro_step(3, 1), guard.context("inference"):
        pass


RAISED = {
    UnsanctionedCall: violate_unsanctioned,
    BudgetExceeded: violate_exceeded,
    BudgetUnmet: violate_unmet,
    NoContext: violate_no_context,
    ReentrantCall: violate_reentrant,
    ContextSwitchRefused: violate_switch,
}


class TestMessages:
    def test_unsanctioned_call(self, guard, x):
        """What was called, from where, in which state, and what to do: line by line."""
        with guard.context("training"), pytest.raises(UnsanctionedCall) as caught:
            line = here(+1)
            guard.module(x)
        assert str(caught.value).splitlines() == [
            "Scorer was called in training outside its sanctioned scope.",
            *called_from(line, caught.value.record),
            "  context      training (thread MainThread)",
            "  scope        none open",
            "  budget       preference_scorer: 0 of 1 spent",
            "  what to do   Remove the call, or run it in inference context outside the "
            "micro-step. "
            'Only the contract\'s one caller opens `with guard.sanctioned("preference_scorer"):`.',
            "  explained by lensnet-guard explain called-from-elsewhere",
        ]

    def test_unsanctioned_call_names_every_scope(self, make_guard, x):
        """With several scopes each way to sanction a call is shown, and each budget."""
        guard = make_guard(critic=2, actor=1)
        with guard.context("training"), pytest.raises(UnsanctionedCall) as caught:
            guard.module(x)
        assert str(caught.value).splitlines()[-4:] == [
            "  budget       critic: 0 of 2 spent",
            "  budget       actor: 0 of 1 spent",
            "  what to do   Remove the call, or run it in inference context outside the "
            "micro-step. "
            'Only the contract\'s one caller opens `with guard.sanctioned("critic"):` '
            'or `with guard.sanctioned("actor"):`.',
            "  explained by lensnet-guard explain called-from-elsewhere",
        ]

    def test_sanctioned_caller_outside_any_micro_step(self, x):
        """A sanctioned caller needs a micro-step, and the message says so."""
        caller = f"{__name__}:violate_unsanctioned"
        guard = guard_module(nn.Linear(3, 2), policy=CallPolicy(sanctioned_callers={caller: 1}))
        with pytest.raises(UnsanctionedCall) as caught:
            violate_unsanctioned(guard, x)
        lines = str(caught.value).splitlines()
        assert lines[0] == (
            "Linear was called in training outside its sanctioned scope: its sanctioned caller "
            "runs outside any micro-step, where no budget counts."
        )
        assert lines[-5:] == [
            "  context      training (thread MainThread)",
            f"  scope        {caller}",
            f"  budget       {caller}: 0 of 1 spent",
            "  what to do   Remove the call, or run it in inference context outside the "
            "micro-step. "
            f"Only calls from {caller} inside `with guard.micro_step(step):` are legal.",
            "  explained by lensnet-guard explain called-from-elsewhere",
        ]

    def test_budget_exceeded(self, make_guard, x):
        """Every earlier call that spent the budget is named with its place."""
        guard = make_guard(preference_scorer=2)
        with (
            pytest.raises(BudgetExceeded) as caught,
            guard.context("training"),
            guard.micro_step(step=12, micro_step=3),
            guard.sanctioned("preference_scorer"),
        ):
            first = here(+1)
            guard.module(x)
            second = here(+1)
            guard.module(x)
            line = here(+1)
            guard.module(x)
        assert str(caught.value).splitlines() == [
            "Scorer was called in training more often than its budget allows.",
            *called_from(line, caught.value.record),
            "  context      training, step 12, micro-step 3 (thread MainThread)",
            "  scope        preference_scorer",
            "  budget       preference_scorer: 2 of 2 spent",
            f"  spent by     call 1 at {first}",
            f"  spent by     call 2 at {second}",
            "  what to do   Score everything in one batched call, or raise the budget in "
            "CallPolicy if the contract really allows more.",
            "  explained by lensnet-guard explain called-twice",
        ]
        assert caught.value.earlier == guard.calls[:2]
        assert caught.value.record is guard.calls[2]

    def test_budget_unmet(self, make_guard, x):
        """All unmet budgets stand in the headline, met ones do not."""
        guard = make_guard(critic=2, actor=1, met=1)
        with guard.context("training"), pytest.raises(BudgetUnmet) as caught:
            line = here(+1)
            with guard.micro_step(5):
                with guard.sanctioned("critic"):
                    guard.module(x)
                with guard.sanctioned("met"):
                    guard.module(x)
        assert str(caught.value).splitlines() == [
            "A micro-step ended before the call budget of Scorer was met: "
            "critic made 1 of 2 calls, actor made 0 of 1 calls.",
            '  due from     `with guard.sanctioned("critic"):`, which was opened 1 time',
            '               `with guard.sanctioned("actor"):`, which was not opened',
            f"  ended at     {line}",
            "  context      training, step 5, micro-step 0 (thread MainThread)",
            "  scope        none open",
            "  budget       critic: 1 of 2 spent",
            "  budget       actor: 0 of 1 spent",
            "  budget       met: 1 of 1 spent",
            "  what to do   Find why the call was skipped (an early return, a cached result, an "
            "empty batch), or lower the budget in CallPolicy.",
            "  explained by lensnet-guard explain called-conditionally",
        ]

    def test_budget_unmet_of_a_lone_scope(self, guard):
        """A scope that is its own micro-step says which scope it was."""
        with guard.context("training"), pytest.raises(BudgetUnmet) as caught:
            line = here(+1)
            with guard.sanctioned("preference_scorer"):
                pass
        assert str(caught.value).splitlines() == [
            "A micro-step ended before the call budget of Scorer was met: "
            "preference_scorer made 0 of 1 calls.",
            '  due from     `with guard.sanctioned("preference_scorer"):`, which was opened 1 time',
            f"  ended at     {line}",
            "  context      training (thread MainThread)",
            "  scope        preference_scorer",
            "  budget       preference_scorer: 0 of 1 spent",
            "  what to do   Find why the call was skipped (an early return, a cached result, an "
            "empty batch), or lower the budget in CallPolicy.",
            "  explained by lensnet-guard explain called-conditionally",
        ]

    def test_no_context(self, guard, x):
        """The message says how to declare a context, and how to carry one into a thread."""
        with pytest.raises(NoContext) as caught:
            line = here(+1)
            guard.module(x)
        assert str(caught.value).splitlines() == [
            "Scorer was used in a thread that has declared neither training nor inference.",
            *called_from(line, caught.value.record),
            "  context      unset (thread MainThread)",
            "  scope        none open",
            "  budget       preference_scorer: 0 of 1 spent",
            '  what to do   Declare it with `guard.context("training")` or '
            '`guard.context("inference")`. Threads and executors start without one: bind their '
            "function with `guard.carry(fn)`.",
            "  explained by lensnet-guard explain called-from-elsewhere",
        ]

    def test_no_context_in_a_thread(self, guard, x, in_thread):
        """The thread is named, which is where to look."""
        with (
            guard.context("training"),
            pytest.raises(NoContext, match=r"unset \(thread prefetch\)"),
        ):
            in_thread(guard.module, x, name="prefetch")

    @pytest.mark.parametrize(
        ("opened", "detail"),
        [
            (lambda g: g.micro_step(), ": a micro-step was opened."),
            (
                lambda g: g.sanctioned("preference_scorer"),
                ": the scope 'preference_scorer' was opened.",
            ),
        ],
        ids=["micro_step", "scope"],
    )
    def test_no_context_of_a_block(self, guard, opened, detail):
        """A block opened without a context is named in the headline, its `with` is the caller."""
        with pytest.raises(NoContext) as caught:
            line = here(+1)
            with opened(guard):
                pytest.fail("the body of a refused block ran")
        message = str(caught.value).splitlines()
        assert message[0] == (
            f"Scorer was used in a thread that has declared neither training nor inference{detail}"
        )
        assert message[1:4] == called_from(line, caught.value.record)

    def test_reentrant_call(self, scorer, guard, x):
        """The inner call is the one that is refused and named."""
        place = []

        def again():
            place.append(here(+1))
            guard.module(x)

        scorer.inside = again
        with guard.context("inference"), pytest.raises(ReentrantCall) as caught:
            guard.module(x)
        assert str(caught.value).splitlines() == [
            "Scorer was called from inside its own running call.",
            *called_from(place[0], caught.value.record),
            "  context      inference (thread MainThread)",
            "  scope        none open",
            "  budget       preference_scorer: 0 of 1 spent",
            "  what to do   The module's forward, or a hook on it, calls the guarded module: "
            "remove that call.",
            "  explained by lensnet-guard explain called-twice",
        ]

    @pytest.mark.parametrize(
        ("opened", "detail"),
        [
            (lambda g: g.context("inference"), "inference was asked for"),
            (lambda g: g.micro_step(9), "another micro-step was asked for"),
        ],
        ids=["inference", "micro_step"],
    )
    def test_context_switch_refused(self, guard, x, opened, detail):
        """The message is about the `with` that asked for the switch."""
        with pytest.raises(ContextSwitchRefused) as caught, guard.context("training"):
            with guard.micro_step(4, 2), guard.sanctioned("preference_scorer"):
                guard.module(x)
                line = here(+1)
                with opened(guard):
                    pytest.fail("the body of a refused block ran")
        assert str(caught.value).splitlines() == [
            f"Scorer cannot change context inside an open micro-step: {detail}.",
            *called_from(line, caught.value.record),
            "  context      training, step 4, micro-step 2 (thread MainThread)",
            "  scope        preference_scorer",
            "  budget       preference_scorer: 1 of 1 spent",
            *[f"  spent by     call {r.seq} at {r.caller}" for r in guard.calls],
            "  what to do   Close the micro-step first. Helpers that run inside it work in its "
            "context and on its budget.",
            "  explained by lensnet-guard explain called-from-elsewhere",
        ]

    def test_bypassed_guard(self):
        """The text for a run behind the guard's back, which a later tripwire will raise."""
        record = CallRecord(
            *(1, 1, "Scorer", "bypass", "refuse", "BypassedGuard", "training", None, None, None),
            *("MainThread", True),
        )
        assert str(build_violation(record, CallPolicy())).splitlines() == [
            "Scorer was run behind its guard's back.",
            "  context      training (thread MainThread)",
            "  scope        none open",
            "  budget       preference_scorer: 0 of 1 spent",
            "  what to do   Call guard.module, not the module behind it or a part of it. A part "
            "that another model runs too is named in CallPolicy(shared_submodules=...).",
            "  explained by lensnet-guard explain bypassed-wrapper",
        ]

    def test_an_earlier_call_that_raised(self, scorer, x):
        """After an out-of-memory error the retry finds the budget spent, and reads why."""
        guard = guard_module(scorer)
        with pytest.raises(BudgetExceeded) as caught, guard.context("training"):
            with guard.sanctioned("preference_scorer"):
                with contextlib.suppress(RuntimeError):
                    guard.module(torch.ones(1, 7))
                guard.module(x)
        (line,) = [line for line in str(caught.value).splitlines() if "spent by" in line]
        assert line.endswith(", which raised RuntimeError")

    def test_name_of_the_guard_stands_in_the_message(self, x):
        """A module with a name of its own is called by it, also when the name has braces."""
        guard = guard_module(nn.Linear(3, 2), name="critic {0} {module}")
        with pytest.raises(NoContext, match=r"^critic \{0\} \{module\} was used in a thread"):
            guard.module(x)

    def test_file_elsewhere_is_shown_in_full(self, guard, x, tmp_path, monkeypatch):
        """A file that is not below the working directory keeps its absolute path."""
        monkeypatch.chdir(tmp_path)
        with pytest.raises(NoContext) as caught:
            guard.module(x)
        assert f"  called from  {HERE}:" in str(caught.value)

    def test_a_call_through_three_frames_of_a_library_hid_the_line(self, guard, x):
        """The engine around a module calls it, and who called the engine stands below."""
        library = {}
        path = "/env/site-packages/engine/wrapper.py"
        code = "def three(f, x): return f(x)\ndef two(*a): return three(*a)\n"
        code += "def run(*a): return two(*a)\n"
        exec(compile(code, path, "exec"), library)
        with pytest.raises(NoContext) as caught:
            library["run"](guard.module, x)
        rows = str(caught.value).splitlines()[1:4]
        assert rows[:2] == [
            f"  called from  {path}:1 in three",
            f"               {path}:2 in two",
        ]
        assert f"{HERE.name}:" in rows[2]
        assert rows[2].endswith("test_a_call_through_three_frames_of_a_library_hid_the_line")

    def test_call_at_the_top_level_of_a_script(self, run_python):
        """A stack of one frame gives one row, and the traceback shows the whole message."""
        result = run_python(
            """
            from torch import nn
            import torch, lensnet_guard
            lens = lensnet_guard.guard_module(nn.Linear(3, 2)).module
            lens(torch.ones(1, 3))
            """
        )
        assert result.returncode == 1
        text = result.stderr.partition("lensnet_guard.NoContext: ")[2].splitlines()
        assert text[1:3] == [
            "  called from  script.py:5 in <module>",
            "  context      unset (thread MainThread)",
        ]


class TestEvidence:
    @pytest.mark.parametrize("violation", RAISED, ids=lambda v: v.__name__)
    def test_type_record_and_ring_agree(self, guard, x, violation):
        """The record of a violation is the guard's own, with the violation's name as reason."""
        with pytest.raises(LensNetViolation) as caught:
            RAISED[violation](guard, x)
        assert type(caught.value) is violation
        assert caught.value.record is guard.violations[-1]
        assert caught.value.record.reason == violation.__name__
        assert caught.value.record.verdict == "refuse"
        assert guard.violation_count == len(guard.violations) == 1

    @pytest.mark.parametrize("violation", RAISED, ids=lambda v: v.__name__)
    def test_pickle_and_copies(self, guard, x, violation):
        """Message, record, stack and earlier calls come through every copy."""
        with pytest.raises(violation) as caught:
            RAISED[violation](guard, x)
        original = caught.value
        pickles = [
            pickle.loads(pickle.dumps(original, n)) for n in range(2, pickle.HIGHEST_PROTOCOL + 1)
        ]
        for loaded in [*pickles, copy.copy(original), copy.deepcopy(original)]:
            assert type(loaded) is violation
            assert str(loaded) == str(original)
            assert loaded.args == original.args
            assert repr(loaded.record) == repr(original.record)
            assert loaded.record.stack() == original.record.stack()
            assert loaded.record.inputs == original.record.inputs
            assert [r.seq for r in loaded.earlier] == [r.seq for r in original.earlier]
            assert [r.caller for r in loaded.earlier] == [r.caller for r in original.earlier]

    def test_earlier_is_not_empty_when_a_budget_is_exceeded(self, guard, x):
        """The evidence that the pickling test compares is there at all."""
        with pytest.raises(BudgetExceeded) as caught:
            violate_exceeded(guard, x)
        assert [record.seq for record in caught.value.earlier] == [1]

    def test_bypassed_guard_pickles(self):
        """The one violation that nothing raises yet pickles like the others."""
        record = CallRecord(1, 1, "m", "bypass", "refuse", "BypassedGuard", *[None] * 4, "t", True)
        loaded = pickle.loads(pickle.dumps(BypassedGuard("text", record, [record])))
        assert (type(loaded), str(loaded)) == (BypassedGuard, "text")
        assert loaded.earlier == (loaded.record,)

    @pytest.mark.skipif(sys.version_info < (3, 11), reason="notes are 3.11+")
    def test_notes_were_lost_in_pickles(self, guard, x):
        """What a user added with add_note is evidence as well."""
        with pytest.raises(NoContext) as caught:
            guard.module(x)
        caught.value.add_note("seen in worker 3")
        assert pickle.loads(pickle.dumps(caught.value)).__notes__ == ["seen in worker 3"]

    def test_pickle_goes_to_another_process_and_back(self, guard, x, tmp_path):
        """A process that never saw the test's code reads the violation, and sends it back."""
        with pytest.raises(BudgetExceeded) as caught:
            violate_exceeded(guard, x)
        code = (
            "import pickle, sys\n"
            "error = pickle.load(sys.stdin.buffer)\n"
            "assert error.record.caller.function == 'violate_exceeded', error.record.caller\n"
            "sys.stdout.buffer.write(pickle.dumps(error))\n"
        )
        sent = pickle.dumps(caught.value)
        done = subprocess.run(
            [sys.executable, "-c", code], input=sent, cwd=tmp_path, capture_output=True, check=True
        )
        back = pickle.loads(done.stdout)
        assert str(back) == str(caught.value)
        assert back.record.stack() == caught.value.record.stack()
        assert back.earlier[0].stack() == caught.value.earlier[0].stack()

    def test_raised_in_a_spawned_pool_worker(self):
        """multiprocessing brings a worker's violation to the parent with its evidence."""
        guard = guard_module(nn.Linear(3, 2))
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            result = pool.apply_async(guard.module, ([1.0],))
            with pytest.raises(NoContext) as caught:
                result.get(timeout=60)
        assert caught.value.record.inputs == ("(float)",)
        assert caught.value.record.caller.function == "worker"
        assert caught.value.record.thread == "MainThread"
        assert os.path.basename(caught.value.record.caller.file) == "pool.py"
