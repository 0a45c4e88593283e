"""Runs behind the guard's back: refused before they compute, recorded with the true caller."""

import contextlib
import copy
import functools
import inspect
import pickle
import re

import pytest
import torch
from tests.lensnet_guard.boundary.lens import Lens, guard_free
from tests.lensnet_guard.helpers import X
from torch import nn

from lensnet_guard import BypassedGuard, CallPolicy, guard_module, guard_of, lensnet_guard


@pytest.fixture
def guard(lens):
    return guard_module(lens)


BYPASSES = {
    "a reference from before": lambda guard, lens: lens(X),
    "__wrapped__": lambda guard, lens: guard.module.__wrapped__(X),
    "forward": lambda guard, lens: lens.forward(X),
    "_call_impl": lambda guard, lens: lens._call_impl(X),
    "_wrapped_call_impl": lambda guard, lens: guard.module._wrapped_call_impl(X),
    "functional_call": lambda guard, lens: torch.func.functional_call(
        lens, {"extras.norm.bias": torch.ones(3)}, X
    ),
    "a deep copy": lambda guard, lens: copy.deepcopy(lens)(X),
    "a shallow copy": lambda guard, lens: copy.copy(lens)(X),
    "a submodule": lambda guard, lens: lens.blocks[0](X),
    "a submodule through the proxy": lambda guard, lens: guard.module.blocks[0](X),
    "a submodule's forward": lambda guard, lens: lens.blocks[1].forward(X),
    "a leaf": lambda guard, lens: lens.blocks[0].linear(X),
    "in a ModuleDict": lambda guard, lens: lens.extras["norm"](X),
    "a deep copy of a submodule": lambda guard, lens: copy.deepcopy(lens.blocks[0])(X),
    "in a container": lambda guard, lens: nn.Sequential(lens)(X),
    "what modules() yields": lambda guard, lens: next(guard.module.modules())(X),
    "vmap": lambda guard, lens: torch.func.vmap(lens)(X),
    "data parallel": lambda guard, lens: nn.parallel.DataParallel(lens)(X),
}


class TestBypasses:
    @pytest.mark.parametrize("context", ["training", "inference"])
    @pytest.mark.parametrize("way", BYPASSES)
    def test_is_refused_before_it_computes(self, guard, lens, way, context):
        """In either context, also where a call through the proxy would be legal."""
        with pytest.raises(BypassedGuard) as caught, guard.context(context):
            BYPASSES[way](guard, lens)
        assert lens.runs == 0
        (record,) = guard.violations
        assert caught.value.record is record
        assert guard.calls == (record,)
        assert (record.kind, record.verdict, record.context) == ("bypass", "refuse", context)
        assert record.inputs == ("float32[3] cpu" if way == "vmap" else "float32[2, 3] cpu",)
        assert record.caller.file == __file__
        code = BYPASSES[way].__code__
        assert record.caller.line in {line for _, _, line in code.co_lines()}
        assert guard.count() == 0

    def test_where_nothing_is_declared(self, guard, lens):
        """The context is beside the point."""
        with pytest.raises(BypassedGuard):
            lens(X)

    def test_inside_the_sanctioned_scope(self, guard, lens):
        """The scope is for the proxy; the budget is not touched."""
        with pytest.raises(BypassedGuard), guard.context("training"):
            with guard.sanctioned("preference_scorer"):
                guard.module(X)
                lens(X)
        assert (lens.runs, guard.count()) == (2, 1)

    def test_swallowed_by_the_body(self, guard, lens):
        """It comes out again when the micro-step ends."""
        with pytest.raises(BypassedGuard, match="was run behind"), guard.context("training"):
            with guard.sanctioned("preference_scorer"):
                guard.module(X)
                with contextlib.suppress(Exception):
                    lens.blocks[0](X)

    def test_in_another_thread_while_a_call_runs(self, make_scorer, in_thread):
        """An admitted run admits its own thread, and no other."""
        raw = make_scorer()
        guard = guard_module(raw)
        raw.inside = lambda: in_thread(raw.linear, X)
        with pytest.raises(BypassedGuard), guard.context("inference"):
            guard.module(X)

    def test_after_a_call_that_raised(self, guard, lens):
        """A call that fails leaves no door open."""
        with guard.context("inference"):
            with pytest.raises(RuntimeError, match="shapes"):
                guard.module(torch.ones(2, 5))
            with pytest.raises(BypassedGuard):
                lens(X)

    def test_the_message(self, guard, lens):
        """Word by word, for a part of the module."""
        with pytest.raises(BypassedGuard) as caught, guard.context("training"):
            lens.blocks[1](X)
        lines = str(caught.value).splitlines()
        assert lines[0] == ("Lens was run behind its guard's back: blocks.1 was run alone.")
        assert re.fullmatch(
            r"  called from  .*test_tripwire\.py:\d+ in .*test_the_message", lines[1]
        )
        assert lines[-2] == (
            "  what to do   Call guard.module, not the module behind it or a part of it. A part "
            "that another model runs too is named in CallPolicy(shared_submodules=...)."
        )
        assert lines[-1] == "  explained by lensnet-guard explain bypassed-wrapper"

    @pytest.mark.parametrize(
        ("way", "detail"),
        [
            ("a reference from before", ""),
            ("a leaf", ": blocks.0.linear was run alone"),
            ("a deep copy", ": Lens, a copy or a former part, was run alone"),
        ],
    )
    def test_the_message_says_what_ran(self, guard, lens, way, detail):
        """The module itself, a part of it, or a copy."""
        with pytest.raises(BypassedGuard) as caught:
            BYPASSES[way](guard, lens)
        headline = str(caught.value).partition("\n")[0]
        assert headline == f"Lens was run behind its guard's back{detail}."

    def test_is_in_the_log(self, lens, tmp_path):
        """With its kind, before it is raised."""
        with lensnet_guard(lens, log=tmp_path) as guard:
            with pytest.raises(BypassedGuard), guard.context("inference"):
                lens(X)
            (line,) = (tmp_path / "lensnet.rank0.jsonl").read_text().splitlines()[1:]
            guard._history.violation_count = 0
        assert '"kind":"bypass"' in line
        assert '"event":"violation"' in line

    def test_the_class_s_forward_is_caught_at_the_first_part(self, guard, lens):
        """`Lens.forward(lens, x)` itself cannot be seen; what it calls first can."""
        with pytest.raises(BypassedGuard, match=r"blocks\.0 was run alone"):
            Lens.forward(lens, X)
        assert lens.runs == 0

    def test_observe_lets_it_run(self, lens):
        """Once recorded, although every submodule is armed as well."""
        guard = guard_module(lens, mode="observe")
        lens(X)
        assert lens.runs == 2
        (record,) = guard.violations
        assert (record.kind, record.reason, record.outcome) == (
            *("bypass", "BypassedGuard"),
            "returned",
        )

    def test_off_arms_nothing(self, lens):
        """The raw module is handed back as it is."""
        assert guard_module(lens, mode="off").module is lens
        assert type(lens) is Lens
        assert type(lens.blocks[0].linear) is nn.Linear
        lens(X)


class TestLegalRuns:
    def test_through_the_proxy(self, guard, lens):
        """Everything inside runs, and gives what the unguarded module gives."""
        expected = guard_free(lens)(X)
        with guard.context("inference"):
            assert torch.equal(guard.module(X), expected)
            assert torch.equal(guard.module.forward(X), expected)
            assert torch.equal(torch.func.functional_call(guard.module, {}, X), expected)
        assert guard.count() == 3

    def test_deep_copies_of_the_proxy(self, guard, lens):
        """A copy has a guard of its own, and its parts answer to that one."""
        copied = copy.deepcopy(guard.module)
        with pytest.raises(BypassedGuard):
            copied.blocks[0](X)
        assert (len(guard_of(copied).violations), len(guard.violations)) == (1, 0)
        with guard_of(copied).context("inference"):
            copied(X)
        assert lens.runs == 0

    def test_shallow_copies_of_the_proxy(self, guard, lens):
        """A shallow copy runs the very submodules of its original."""
        copied = copy.copy(guard.module)
        with guard_of(copied).context("inference"):
            copied(X)
        with guard.context("inference"):
            guard.module(X)
        assert lens.runs == 4

    def test_shared_submodules(self, lens):
        """Parts that other models run too are left alone, with everything inside them."""
        guard_module(lens, policy=CallPolicy(shared_submodules=("blocks.0",)))
        lens.blocks[0](X)
        lens.blocks[0].linear(X)
        with pytest.raises(BypassedGuard):
            lens.blocks[1](X)

    @pytest.mark.parametrize("name", ["block", ""])
    def test_shared_submodule_that_is_none(self, lens, name):
        """A wrong name is told, and leaves the module as it was."""
        policy = CallPolicy(shared_submodules=(name,))
        message = f"^shared_submodules: Lens has no submodule {name!r}$"
        with pytest.raises(ValueError, match=message):
            guard_module(lens, policy=policy)
        assert type(lens) is Lens

    def test_guards_inside_a_guarded_module(self, lens):
        """A part with a contract of its own keeps it; the outer guard does not answer for it."""
        inner = guard_module(lens.blocks[0])
        lens.blocks[0] = inner.module
        outer = guard_module(lens)
        with outer.context("inference"), inner.context("inference"):
            outer.module(X)
        with pytest.raises(BypassedGuard):
            inner.module.__wrapped__(X)
        assert (outer.count(), inner.count(), len(inner.violations)) == (1, 1, 1)
        assert outer.violations == ()


def hooked(module, *args):
    return module.old_forward(*args)


def bound_forward(module):
    module.forward = module.forward


def hooked_forward(module):
    """What accelerate's add_hook_to_module does."""
    module.old_forward = module.forward
    module.forward = functools.update_wrapper(functools.partial(hooked, module), module.old_forward)


def everywhere(put):
    def put_everywhere(lens):
        for part in lens.modules():
            if type(part) is not nn.ModuleList and type(part) is not nn.ModuleDict:
                put(part)

    return put_everywhere


OWN_FORWARDS = {
    "a bound method": bound_forward,
    "a hook": hooked_forward,
    "bound methods on all parts": everywhere(bound_forward),
    "hooks on all parts": everywhere(hooked_forward),
    "a hook on a part": lambda lens: hooked_forward(lens.blocks[1].linear),
}


COPIES = {
    "of the proxy": lambda guard: copy.deepcopy(guard.module),
    "of a copy": lambda guard: copy.deepcopy(copy.deepcopy(guard.module)),
    "of the guard": lambda guard: copy.deepcopy(guard).module,
    "of an owner": lambda guard: copy.deepcopy({"lens": guard.module})["lens"],
    "a pickle": lambda guard: pickle.loads(pickle.dumps(guard.module)),
}


def moved_by(module, run):
    """How far an output moves with the last bias of the module."""
    with torch.no_grad():
        before = run()
        module.extras["norm"].bias.add_(100)
        return (run() - before).mean().item()


class TestForwardOnTheInstance:
    """A copy of a module with a forward of its own ran the weights of the original."""

    @pytest.mark.parametrize("mode", ["enforce", "observe"])
    @pytest.mark.parametrize("way", COPIES)
    @pytest.mark.parametrize("own", OWN_FORWARDS)
    @pytest.mark.parametrize("when", ["before", "after"])
    def test_copies_run_their_own_weights(self, lens, own, way, mode, when):
        """Whether it was put there before the module was guarded or after."""
        if when == "before":
            OWN_FORWARDS[own](lens)
        guard = guard_module(lens, mode=mode)
        if when == "after":
            OWN_FORWARDS[own](lens)
        copied = COPIES[way](guard)
        mine = guard_of(copied)
        with mine.context("inference"), guard.context("inference"):
            assert moved_by(copied, lambda: copied(X)) == pytest.approx(100, abs=1e-3)
            assert moved_by(copied, lambda: guard.module(X)) == 0
        assert (guard.violations, mine.violations) == ((), ())
        guard.uninstall()
        with mine.context("inference"):
            assert moved_by(copied, lambda: copied(X)) == pytest.approx(100, abs=1e-3)
            assert lens(X).mean().item() == pytest.approx(0, abs=1e-3)

    @pytest.mark.parametrize("own", OWN_FORWARDS)
    def test_copies_of_the_raw_module(self, lens, own):
        """Refused as ever; when the guard is gone they run their own weights as well."""
        OWN_FORWARDS[own](lens)
        guard = guard_module(lens)
        copied, part = copy.deepcopy(lens), copy.deepcopy(lens.blocks[1])
        for run in (copied, part, copy.copy(lens)):
            with pytest.raises(BypassedGuard):
                run(X)
        guard.uninstall()
        assert moved_by(copied, lambda: copied(X)) == pytest.approx(100, abs=1e-3)
        with torch.no_grad():
            part.linear.bias.fill_(100)
            assert part(X).mean() > lens.blocks[1](X).mean() + 50

    @pytest.mark.parametrize("own", OWN_FORWARDS)
    def test_shallow_copies_run_what_the_control_runs(self, lens, own):
        """The submodules of the original, which it shares."""
        OWN_FORWARDS[own](lens)
        guard = guard_module(lens)
        copied = copy.copy(guard.module)
        with guard_of(copied).context("inference"):
            assert moved_by(lens, lambda: copied(X)) == pytest.approx(100, abs=1e-3)

    @pytest.mark.parametrize("own", OWN_FORWARDS)
    def test_pickles_hold_the_forward_alone(self, lens, own):
        """A raw module is saved as if it were not guarded."""
        OWN_FORWARDS[own](lens)
        plain = pickle.dumps(lens)
        guard = guard_module(lens)
        loaded = pickle.loads(pickle.dumps(lens))
        assert type(loaded) is Lens
        assert moved_by(loaded, lambda: loaded(X)) == pytest.approx(100, abs=1e-3)
        guard.uninstall()
        assert len(pickle.dumps(lens)) == len(plain)

    def test_its_signature(self, lens):
        """Trainers read from it what columns of a data set the model takes."""
        hooked_forward(lens)
        control = inspect.signature(lens.forward)
        guard = guard_module(lens)
        assert inspect.signature(lens.forward) == inspect.signature(guard.module.forward) == control
