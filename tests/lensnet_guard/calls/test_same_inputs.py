"""The condition that two models are given the same input."""

import copy
import gc
import pickle
import re
import weakref

import pytest
import torch
from tests.lensnet_guard.calls.asked import call, guarded
from torch import nn
from torch.utils.checkpoint import checkpoint

from lensnet_guard import (
    CallPolicy,
    ConditionUnmet,
    Scope,
    guard_module,
    guard_of,
    inference_too,
    same_inputs,
)
from lensnet_guard._torch_internals import compile_counters
from lensnet_guard.calls.scope import name_of
from lensnet_guard.calls.tensors import describe


class Model(nn.Module):
    """A policy, or its reference."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(9, 2)

    def forward(self, input_ids, attention_mask=None):
        return self.embed(input_ids) if isinstance(input_ids, torch.Tensor) else None


def scores(input_ids):
    """A forward that is no method."""
    return input_ids


@pytest.fixture
def ids():
    return torch.arange(8).reshape(2, 4)


@pytest.fixture
def policy():
    return Model()


@pytest.fixture
def make(policy):
    """A guarded reference that must be given what the policy was given."""

    def make(other=policy, name="input_ids", **kwargs):
        return guarded(Model(), same_inputs(other, name, **kwargs))

    return make


def refusal(guard, *args, **kwargs):
    """What a call is refused for, after the condition's name."""
    with pytest.raises(ConditionUnmet) as refused:
        call(guard, *args, **kwargs)
    headline = str(refused.value).partition("\n")[0]
    return re.search(r"allow: same_inputs\([^)]*\): (.*)\.$", headline).group(1)


class TestSameMemory:
    def test_the_whole_headline(self, make, policy, ids):
        """With the name of the condition, and how either tensor looks."""
        guard = make()
        policy(ids)
        with pytest.raises(ConditionUnmet) as refused:
            call(guard, ids[:1].clone())
        assert str(refused.value).partition("\n")[0] == (
            "Model was called in a state that its contract does not allow: same_inputs(Model, "
            "'input_ids'): input_ids is another tensor (int64[1, 4] cpu) than Model was given in "
            "its last call (int64[2, 4] cpu); give both the same one, or ask for same_inputs(..., "
            "values=True)."
        )
        assert guard.count() == 0

    @pytest.mark.parametrize("view", [lambda x: x, lambda x: x[:], lambda x: x.detach()])
    def test_holds_for_the_same_memory(self, make, policy, ids, view):
        """By position or by name, and also for a view that is just the same."""
        guard = make()
        policy(ids)
        call(guard, view(ids))
        policy(input_ids=view(ids))
        call(guard, input_ids=ids)
        assert guard.violations == ()

    @pytest.mark.parametrize(
        "other",
        [
            lambda x: x.clone(),
            lambda x: x[1:],
            lambda x: x.T,
            lambda x: x.reshape(4, 2),
            lambda x: x.view(torch.float64),
        ],
        ids=["a copy", "a part", "transposed", "another shape", "another dtype"],
    )
    def test_anything_else_is_another(self, make, policy, ids, other):
        """Whatever it holds: no values are read."""
        guard = make()
        policy(ids)
        assert refusal(guard, other(ids)).startswith("input_ids is another tensor (")

    def test_memory_that_is_given_out_again(self, make, policy):
        """The next batch may lie where the last one lay, and is another."""
        guard = make()
        memory = bytearray(64)
        policy(torch.frombuffer(memory, dtype=torch.int64))
        again = torch.frombuffer(memory, dtype=torch.int64)
        assert "is another tensor" in refusal(guard, again)
        policy(again)
        call(guard, again)

    def test_written_in_place_in_between(self, make, policy, ids):
        """As by padding, or by masking what is not scored."""
        guard = make()
        policy(ids)
        ids[0, 0] = 7
        assert refusal(guard, ids) == "input_ids was written in place since Model was given it"

    def test_made_in_inference_mode(self, make, policy):
        """Such a tensor has no counter, and is the same all the same."""
        guard = make()
        with torch.inference_mode():
            ids = torch.arange(8).reshape(2, 4)
            policy(ids)
            call(guard, ids)
        assert guard.violations == ()

    def test_none(self, make, policy, ids):
        """An argument that neither was given, or both as None."""
        guard = make(name="attention_mask")
        policy(ids, None)
        call(guard, ids, None)
        policy(ids, None)
        assert refusal(guard, ids, ids) == (
            "attention_mask is int64[2, 4] cpu, Model was given NoneType, and only tensors are "
            "compared"
        )
        policy(ids)
        assert refusal(guard, ids, None) == "Model was given no attention_mask in its last call"
        policy(ids, ids)
        assert refusal(guard, ids) == (
            "the call has no argument 'attention_mask', only ['input_ids']"
        )

    def test_what_is_no_tensor(self, make, policy):
        """Cannot be compared, and is told as what it is."""
        guard = make()
        policy([1, 2])
        assert refusal(guard, [1, 2]) == (
            "input_ids is list, Model was given list, and only tensors are compared"
        )

    def test_sparse_tensors(self, make, policy):
        """Which have no storage of their own: the very same one counts."""
        rows = torch.eye(3).to_sparse()
        policy.forward = lambda input_ids: None
        module = Model()
        module.forward = lambda input_ids: None
        guard = guarded(module, same_inputs(policy, "input_ids"))
        policy(rows)
        call(guard, rows)
        policy(rows)
        assert "is another tensor" in refusal(guard, rows.clone())


class TestCalls:
    def test_the_other_must_come_first(self, make, policy, ids):
        """In every round: what it was given the time before is not enough."""
        guard = make()
        expected = "Model has not been called since input_ids was last compared; call it first"
        assert refusal(guard, ids) == expected
        policy(ids)
        call(guard, ids)
        assert refusal(guard, ids) == expected

    def test_the_last_one_counts(self, make, policy, ids):
        """Of several calls in between."""
        guard = make()
        policy(ids)
        policy(ids.clone())
        assert "is another tensor" in refusal(guard, ids)

    def test_each_guard_asks_for_itself(self, policy, ids):
        """One policy for two references: either is compared with the same call."""
        condition = same_inputs(policy, "input_ids")
        one, other = guarded(Model(), condition), guarded(Model(), condition)
        policy(ids)
        call(one, ids)
        call(other, ids)
        assert "has not been called" in refusal(one, ids)

    def test_asked_twice_of_one_call(self, policy, ids):
        """By the policy and by its scope: neither uses up the other's."""
        scope = Scope(1, requires=(same_inputs(policy, "input_ids"),))
        contract = CallPolicy({"kl": scope}, requires=(same_inputs(policy, "input_ids"),))
        guard = guard_module(Model(), policy=contract)
        policy(ids)
        call(guard, ids)
        assert guard.violations == ()

    @pytest.mark.parametrize("duplicate", [copy.deepcopy, copy.copy])
    def test_of_copies_are_none_of_its(self, make, policy, ids, duplicate):
        """As of an average of the policy's weights."""
        guard = make()
        policy(ids)
        duplicate(policy)(ids.clone())
        call(guard, ids)
        assert guard.violations == ()

    @pytest.mark.parametrize("reentrant", [False, True])
    def test_a_recompute_is_none(self, make, policy, ids, reentrant):
        """What a checkpoint runs again in backward says nothing of what comes next."""
        guard = make()
        weight = torch.ones(1, requires_grad=True)

        def run(weight):
            return (policy(ids) * weight).sum()

        loss = checkpoint(run, weight, use_reentrant=reentrant)
        call(guard, ids)
        loss.backward()
        assert "has not been called" in refusal(guard, ids)

    @pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of the compiler, on import
    def test_of_a_compiled_model(self, make, policy, ids):
        """The hook breaks its graph, sees each call, and has nothing compiled anew."""
        torch._dynamo.reset()
        policy.compile(backend="eager")
        guard, graphs = make(), []
        for _ in range(12):
            batch = ids.clone()
            policy(batch)
            call(guard, batch)
            graphs.append(compile_counters()[0])
        assert len(set(graphs)) == 1
        policy(ids)
        assert "is another tensor" in refusal(guard, ids.clone())
        torch._dynamo.reset()

    def test_through_whatever_is_given_as_the_other(self, make, policy, ids):
        """A guarded module, its guard, or the raw one behind it: one and the same."""
        other = guard_module(policy)
        for given in (other, other.module, policy):
            guard = make(given)
            with other.context("inference"):
                other.module(ids)
            call(guard, ids)
            assert guard.policy.requires[0].other is policy


class TestValues:
    def test_equal_ones_count(self, make, policy, ids):
        """And the very same too."""
        guard = make(values=True)
        for given in (ids.clone(), ids, ids.T.contiguous().T):
            policy(ids)
            call(guard, given)
        assert guard.violations == ()

    def test_others_do_not(self, make, policy, ids):
        """Of the same shape, or of another."""
        guard = make(values=True)
        policy(ids)
        assert refusal(guard, ids + 1) == (
            "input_ids has other values (int64[2, 4] cpu) than Model was given (int64[2, 4] cpu)"
        )
        for other in (ids[:1], ids.float()):
            policy(ids)
            assert f"has other values ({describe(other)}) than" in refusal(guard, other)

    def test_that_were_written_over(self, make, policy, ids):
        """What it was given is no more, whatever it was equal to."""
        guard = make(values=True)
        policy(ids)
        before = ids.clone()
        ids.zero_()
        assert refusal(guard, before) == (
            "input_ids cannot be compared: what Model was given was written in place since"
        )

    @pytest.mark.parametrize("values", [False, True])
    def test_what_is_held(self, make, policy, values):
        """Nothing; with values=True the tensor until it is compared."""
        guard = make(values=values)
        ids = torch.arange(8).reshape(2, 4)
        freed = weakref.ref(ids)
        other = ids.clone()
        policy(ids)
        del ids
        assert (freed() is None) is not values
        if values:
            call(guard, other)
        assert freed() is None


class TestCondition:
    @pytest.mark.parametrize(
        ("args", "error", "message"),
        [
            (("policy", "x"), TypeError, "other must be a module or a guard, not 'policy'"),
            ((Model(), 3), TypeError, "name must be an argument's name, not 3"),
            ((Model(), "input_ids", 1), TypeError, "values must be True or False, not 1"),
            (
                (Model(), "ids"),
                ValueError,
                "the forward of Model takes no 'ids', only ['input_ids', 'attention_mask']",
            ),
        ],
    )
    def test_wrong_arguments(self, args, error, message):
        """Are refused when it is made."""
        with pytest.raises(error) as refused:
            same_inputs(*args)
        assert str(refused.value) == f"same_inputs: {message}"

    def test_a_forward_that_takes_any_name(self, policy, ids):
        """As of a wrapper: it is found where it is given by name."""

        class Wrapper(nn.Module):
            def __init__(self):
                super().__init__()
                self.inner = policy

            def forward(self, *args, **kwargs):
                return self.inner(*args, **kwargs)

        wrapper = Wrapper()
        guard = guarded(Model(), same_inputs(wrapper, "input_ids"))
        wrapper(input_ids=ids)
        call(guard, ids)
        wrapper(ids)
        assert refusal(guard, ids) == "Wrapper was given no input_ids in its last call"

    def test_is_a_value(self, policy):
        """Equal to its like, and named as it is written."""
        one = same_inputs(policy, "input_ids")
        assert one == same_inputs(guard_module(policy), "input_ids", values=False)
        assert one != same_inputs(policy, "input_ids", values=True)
        assert one != same_inputs(policy, "attention_mask")
        assert one != same_inputs(Model(), "input_ids")
        assert CallPolicy(requires=(one,)) == CallPolicy(requires=(copy.copy(one),))
        assert name_of(one) == "same_inputs(Model, 'input_ids')"
        named = same_inputs(policy, "input_ids", values=True)
        assert name_of(*inference_too(named)) == "same_inputs(Model, 'input_ids', values=True)"

    @pytest.mark.parametrize("order", ["policy first", "reference first"])
    def test_pickled_with_its_modules(self, policy, ids, order):
        """The copies belong together as the originals do, and leave those alone."""
        guard = guarded(Model(), same_inputs(policy, "input_ids"))
        pair = (policy, guard.module) if order == "policy first" else (guard.module, policy)
        loaded = pickle.loads(pickle.dumps(pair))
        new_policy, reference = loaded if order == "policy first" else loaded[::-1]

        new_policy(ids)
        call(guard_of(reference), ids)
        policy(ids)
        assert "has not been called" in refusal(guard_of(reference), ids)
        assert "is another tensor" in refusal(guard, ids.clone())

    def test_pickled_with_a_forward_of_its_own(self, ids):
        """Whose argument has a name that the class's forward has not."""
        policy = nn.Identity()
        policy.forward = scores
        guard = guarded(Model(), same_inputs(policy, "input_ids"))
        new_policy, reference = pickle.loads(pickle.dumps((policy, guard.module)))
        new_policy(ids)
        call(guard_of(reference), ids)
        assert "has not been called" in refusal(guard_of(reference), ids)

    def test_a_policy_that_holds_its_reference(self, policy, ids):
        """A circle: it is pickled all the same."""
        policy.reference = guarded(Model(), same_inputs(policy, "input_ids")).module
        loaded = pickle.loads(pickle.dumps(policy))
        loaded(ids)
        call(guard_of(loaded.reference), ids)
        assert "has not been called" in refusal(guard_of(loaded.reference), ids)

    def test_the_watch_ends_with_it(self, policy):
        """No hook is left behind."""
        condition = same_inputs(policy, "input_ids")
        assert len(policy._forward_pre_hooks) == 1
        del condition
        gc.collect()
        assert len(policy._forward_pre_hooks) == 0
