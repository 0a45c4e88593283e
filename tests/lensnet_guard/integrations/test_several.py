"""Several modules, items of lists, optimizer steps and trainings without a micro-step."""

from types import SimpleNamespace

import pytest
import torch
from tests.lensnet_guard.helpers import FILE, read
from torch import nn

from lensnet_guard import (
    BudgetExceeded,
    BudgetUnmet,
    CallPolicy,
    Scope,
    guard_module,
    guard_modules,
    guard_of,
)
from lensnet_guard.integrations import GuardLost, NothingChecked, Verdicts, sanctioned
from lensnet_guard.integrations._place import find, locate
from lensnet_guard.integrations._watches import contracts_for, watches_for
from lensnet_guard.postmortem import read_verdict

X = torch.ones(1, 3)
KL = CallPolicy({"kl": 1})
ONCE_A_STEP = CallPolicy({"ema": Scope(1, per="step")})


def owner():
    return SimpleNamespace(
        reference=nn.Linear(3, 1), rewards=[len, nn.Linear(3, 1)], models={"old": nn.Linear(3, 1)}
    )


def watching(target, root, **options):
    watches = watches_for(contracts_for(target, **options), root)
    watches.open()
    return watches


def ask(module, scope="kl", times=1):
    with sanctioned(module, scope):
        for _ in range(times):
            module(X)


class TestSeveral:
    def test_a_mapping_of_attributes(self, tmp_path):
        """Each with its own policy; one log tells of all, and a line each of what it came to."""
        root = owner()
        raw = root.reference, root.rewards[1]
        target = {"reference": KL, "rewards.1": CallPolicy({"score": 2})}
        watches = watching(target, root, log=tmp_path)
        for step in range(2):
            watches.begin_step(step, 0)
            ask(root.reference)
            ask(root.rewards[1], "score", 2)
            watches.end_step()
        verdict = watches.conclude()
        watches.close()
        assert isinstance(verdict, Verdicts)
        assert str(verdict) == (
            "reference: 2 micro-steps, 2 training calls (kl 2), 0 inference calls, 0 violations\n"
            "rewards.1: 2 micro-steps, 4 training calls (score 4), 0 inference calls, 0 violations"
        )
        assert (root.reference, root.rewards[1]) == raw
        assert [path.name for path in tmp_path.iterdir()] == [FILE]
        assert read_verdict(tmp_path).violations == 0
        header = read(tmp_path / FILE)[0]
        assert header["module"] == "reference, rewards.1"
        assert header["policies"] == {name: policy.to_json() for name, policy in target.items()}

    @pytest.mark.parametrize("logs", [True, False])
    def test_guards_of_before_are_given_back_without_the_log(self, tmp_path, logs):
        """It ends with the training; one that logged before goes on."""
        root = owner()
        first, other = guard_module(root.reference), guard_module(root.rewards[1])
        root.reference, root.rewards[1] = first.module, other.module
        if logs:
            first.start_log(tmp_path)
        options = {} if logs else {"log": tmp_path}
        watches = watching({"reference": None, "rewards.1": None}, root, **options)
        assert first.log_path == other.log_path == tmp_path / FILE
        watches.close()
        assert (first.log is not None, other.log) == (logs, None)
        assert len(read(tmp_path / FILE)) == (1 if logs else 2)

    def test_guards_of_several(self):
        """What `guard_modules` has made is taken as it is."""
        root = owner()
        guards = guard_modules({"a": root.reference, "b": root.models["old"]}, policy=KL)
        root.reference, root.models["old"] = guards.modules.values()
        root.rewards[1] = None
        watches = watches_for(contracts_for(guards), root, must_be_found=False)
        watches.open()
        watches.begin_step(0, 0)
        ask(root.reference)
        with pytest.raises(BudgetUnmet, match="of b was met"):
            watches.end_step()
        watches.close()
        assert guard_of(root.reference) is guards["a"]

    def test_a_micro_step_that_only_one_can_begin(self):
        """Is open in none."""
        root = owner()
        watches = watching({"reference": KL, "rewards.1": KL}, root)
        lost, root.rewards[1] = root.rewards[1], nn.Linear(3, 1)
        with pytest.raises(GuardLost, match=r"SimpleNamespace.rewards.1 is a Linear without"):
            watches.begin_step(0, 0)
        for guard in watches.guards.values():
            assert guard._admission.open.position().micro_step is None
        root.rewards[1] = lost
        watches.close()

    def test_one_that_cannot_be_guarded(self):
        """The others are given back."""
        root = owner()
        raw = root.reference
        with pytest.raises(TypeError, match="None, so there is nothing to guard"):
            watching({"reference": KL, "no_such": KL}, root)
        assert root.reference is raw
        assert guard_of(raw) is None

    @pytest.mark.parametrize(
        ("target", "options", "error", "message"),
        [
            ({}, {}, ValueError, "no module is named: the mapping from attributes to policies is"),
            ({"a": 1}, {}, TypeError, "the policy of 'a' must be a CallPolicy, not 1"),
            ({"a": KL}, {"policy": KL}, ValueError, "several modules are named, each with its own"),
            (3, {}, TypeError, "the first argument must be the name of the attribute"),
        ],
    )
    def test_bad_input(self, target, options, error, message):
        """Is refused when the integration is made."""
        with pytest.raises(error, match=f"^{message}"):
            contracts_for(target, **options)


class TestItems:
    def test_of_lists_and_dicts(self):
        """Are places like any attribute."""
        root = owner()
        assert locate(root, "rewards.1").module is root.rewards[1]
        assert locate(root, "models.old").module is root.models["old"]
        assert locate(root, "rewards.7").module is None
        assert locate(root, "rewards.last").module is None
        assert locate(root, "models.new").module is None

    def test_are_found(self):
        """A guard in a list is no guard that is lost."""
        root = owner()
        guard = guard_module(root.rewards[1])
        root.rewards[1] = guard.module
        place = find(root, guard)
        assert place.path == "SimpleNamespace.rewards.1"
        place.check(guard)

    def test_of_a_module_list(self):
        """Its modules are named by number too."""
        root = nn.Module()
        root.heads = nn.ModuleList([nn.Linear(3, 1)])
        watches = watching("heads.0", root)
        assert guard_of(root.heads[0]) is not None
        watches.close()
        assert guard_of(root.heads[0]) is None


class TestOptimizerSteps:
    def test_last_until_the_next_begins(self):
        """What comes after the last micro-step of a step still belongs to it."""
        root = owner()
        watches = watching("reference", root, policy=ONCE_A_STEP)
        for step in range(3):
            for micro_step in range(2):
                watches.begin_step(step, micro_step)
                watches.end_step()
            ask(root.reference, "ema")
        assert watches.conclude().calls == {"ema": 3}
        watches.close()

    @pytest.mark.parametrize("last", [False, True])
    def test_too_few(self, last):
        """Told as the next step begins, and of the last one as the training ends."""
        root = owner()
        watches = watching("reference", root, policy=ONCE_A_STEP)
        watches.begin_step(0, 0)
        watches.end_step()
        with pytest.raises(BudgetUnmet, match="in 'step' ema made 0 of 1 calls") as caught:
            watches.conclude() if last else watches.begin_step(1, 0)
        watches.close(caught.value)

    def test_too_many(self):
        """An update in every micro-step, say."""
        root = owner()
        watches = watching("reference", root, policy=ONCE_A_STEP)
        watches.begin_step(0, 0)
        ask(root.reference, "ema")
        watches.end_step()
        watches.begin_step(0, 1)
        with pytest.raises(BudgetExceeded):
            ask(root.reference, "ema")
        watches.close(RuntimeError())

    def test_a_training_that_raises_owes_nothing(self):
        """Nor does one that is only closed."""
        root = owner()
        for error in (RuntimeError(), None):
            watches = watching("reference", root, policy=ONCE_A_STEP)
            watches.begin_step(0, 0)
            watches.close(error)
            assert all(guard.violation_count == 0 for guard in watches.guards.values())


class TestNothingChecked:
    def test_a_training_without_a_micro_step(self):
        """Passes not in silence."""
        watches = watching("reference", owner(), policy=KL)
        with pytest.raises(NothingChecked) as caught:
            watches.conclude()
        watches.close()
        assert str(caught.value) == (
            "the training has ended without a micro-step, so no call of reference was checked.\n"
            "  what to do   This trainer has not come to the hooks that open micro-steps. Look "
            "whether the callback was given to the trainer that trains; in a trainer with a loop "
            "of its own open them there, `with guard.micro_step(step):`; or guard with "
            'mode="observe".'
        )

    @pytest.mark.parametrize("mode", ["observe", "off"])
    def test_raises_in_enforce_mode_only(self, mode):
        """As everything."""
        watches = watching("reference", owner(), policy=KL, mode=mode)
        assert watches.conclude().micro_steps == 0
        watches.close()

    def test_in_transformers(self, tmp_path):
        """A trainer whose loop never says that a step begins, as PPO's does not."""
        transformers = pytest.importorskip("transformers")
        from lensnet_guard.integrations.transformers import LensNetGuardCallback

        callback = LensNetGuardCallback(guard_module(nn.Linear(3, 1)))
        arguments = transformers.TrainingArguments(str(tmp_path), report_to=[], use_cpu=True)
        state = transformers.TrainerState(max_steps=3)
        control = transformers.TrainerControl()
        callback.on_train_begin(arguments, state, control, model=nn.Linear(1, 1))
        state.global_step = 3
        callback.on_step_end(arguments, state, control)
        with pytest.raises(NothingChecked):
            callback.on_train_end(arguments, state, control)
        # A training that was complete when it was resumed has nothing to check.
        callback.on_train_begin(arguments, state, control, model=nn.Linear(1, 1))
        callback.on_train_end(arguments, state, control)
        assert callback.verdict.micro_steps == 0


class Wrapper(nn.Module):
    """A wrapper like DistributedDataParallel, which needs processes."""

    def __init__(self, module):
        super().__init__()
        self.module = module

    def forward(self, *args):
        return self.module(*args)


class TestSanctionedWrappers:
    def test_the_scope_of_what_is_wrapped(self):
        """DDP, FSDP and torch.compile around a guarded module."""
        guard = guard_module(nn.Linear(3, 1), policy=KL)
        compiled = torch.compile(Wrapper(guard.module), backend="eager")
        for wrapper in (Wrapper(Wrapper(guard.module)), compiled):
            with guard.context("training"), guard.micro_step(), sanctioned(wrapper, "kl"):
                wrapper(X)
        torch._dynamo.reset()
        assert guard.count("training", "kl") == 2

    def test_a_part_is_guarded_and_not_the_whole(self):
        """Opening nothing in silence would be worse than an error."""
        guard = guard_module(nn.Linear(3, 1), policy=KL)
        model = nn.ModuleDict({"body": nn.Linear(3, 3), "critic": guard.module})
        with pytest.raises(ValueError) as caught:
            sanctioned(model, "kl")
        assert str(caught.value) == (
            "sanctioned(ModuleDict, 'kl') opens nothing: not this module is guarded, but its part "
            "'critic' (Linear). Give that one to sanctioned"
        )

    def test_nobody_guards(self):
        """Then it does nothing, wrapped or not."""
        for module in (nn.Linear(3, 1), Wrapper(nn.Linear(3, 1)), None):
            with sanctioned(module, "kl"):
                pass
        assert guard_of(module) is None
