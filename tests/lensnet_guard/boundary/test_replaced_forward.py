"""A forward that is put on a guarded module, or on a part of it, runs inside its calls only."""

import contextlib
import copy
import functools
import inspect
import pickle
import types

import pytest
import torch
from accelerate.hooks import ModelHook, add_hook_to_module, remove_hook_from_module
from tests.lensnet_guard.boundary.lens import Forwarding, Lens, guard_free
from tests.lensnet_guard.helpers import X
from torch import nn
from torch._dynamo.testing import CompileCounter
from torch.utils.checkpoint import checkpoint

from lensnet_guard import (
    BypassedGuard,
    CallPolicy,
    NoContext,
    ReentrantCall,
    guard_module,
    guard_of,
)

WAYS = {"raw": lambda guard: guard.module.__wrapped__, "proxy": lambda guard: guard.module}


@pytest.fixture
def lens():
    torch.manual_seed(0)
    return Lens()


@pytest.fixture
def guard(lens):
    return guard_module(lens, policy=CallPolicy({"s": 1}))


@pytest.fixture(params=WAYS)
def module(request, guard):
    """Where the forward is put: on the raw module, or through the proxy."""
    return WAYS[request.param](guard)


class Doubles(ModelHook):
    """A hook of accelerate's that can be seen in what the module returns."""

    def post_forward(self, module, output):
        return 2 * output


def call(guard, run=None):
    with guard.context("inference"):
        return (run or guard.module)(X)


def refused(run):
    try:
        run(X)
    except BypassedGuard:
        return True
    return False


class TestWhatIsPutThere:
    def test_runs_in_a_call(self, guard, module, lens):
        """With what it calls of the original, whose call it is."""
        expected, original = guard_free(lens)(X), module.forward
        module.forward = lambda x: original(x) + 1
        assert torch.equal(call(guard), expected + 1)
        assert torch.equal(call(guard, guard.module.forward), expected + 1)
        assert (guard.count(), guard.violations) == (2, ())

    def test_runs_in_a_call_only(self, guard, module, lens):
        """Behind the proxy it is a bypass, by whatever name, whatever it computes."""
        module.forward = lambda x: x + 1
        with guard.context("inference"):
            for run in (lens, lens.forward, lens._call_impl, copy.copy(lens)):
                assert refused(run)
        assert guard.count() == 0

    @pytest.mark.parametrize("name", ["blocks.1", "extras.norm"])
    def test_on_a_part(self, guard, lens, name):
        """As the part itself."""
        expected, part = guard_free(lens)(X), lens.get_submodule(name)
        original = part.forward
        part.forward = lambda x: original(x) + 1
        assert not torch.equal(call(guard), expected)
        assert guard.violations == ()
        with guard.context("inference"):
            assert refused(part)
            assert refused(part.forward)
        part.forward = original
        assert "forward" not in part.__dict__
        assert torch.equal(call(guard), expected)

    def test_written_past_setattr(self, guard, lens):
        """The module's call and the proxy's forward are checked all the same."""
        lens.__dict__["forward"] = lambda x: x + 1
        assert refused(lens)
        assert torch.equal(call(guard), X + 1)
        assert torch.equal(call(guard, guard.module.forward), X + 1)
        with pytest.raises(NoContext):
            guard.module.forward(X)

    def test_on_a_module_with_a_setattr_of_its_own(self):
        """Fabric's hands what it is given to the module inside: that is checked, and not itself."""
        outer = Forwarding(Lens())
        guard = guard_module(outer)
        outer.forward = lambda x: x + 1
        assert "forward" not in outer.__dict__
        assert refused(outer.inside.forward)
        assert torch.equal(call(guard), X + 1)

    def test_bound_to_the_proxy(self, guard, lens):
        """It is given the raw module, as a method is, and so it may call it."""
        proxy, seen = guard.module, []

        def forward(module, x, scale=1):
            seen.append(module)
            return module.extras["norm"](scale * x)

        for bound in (types.MethodType(forward, proxy), functools.partial(forward, proxy)):
            proxy.forward = bound
            call(guard)
        proxy.forward = functools.partial(forward, module=proxy)
        with guard.context("inference"):
            proxy(x=X)
        assert [module is lens for module in seen] == [True] * 3
        assert guard.violations == ()

    def test_its_signature(self, guard, module):
        """Trainers read from it what columns of a data set the model takes."""

        def forward(tokens, mask=None):
            return tokens

        module.forward = forward
        for fetched in (guard.module.forward, guard.module.__wrapped__.forward):
            assert inspect.signature(fetched) == inspect.signature(forward)
            assert fetched.__name__ == "forward"


class TestTakenAway:
    @pytest.mark.parametrize("way", ["deleted", "set back"])
    def test_everything_is_as_before(self, guard, module, lens, way):
        """Same classes, nothing left on the instance, same results, same refusals."""
        before, expected = [type(part) for part in lens.modules()], guard_free(lens)(X)
        attributes = lens.__dict__.copy()
        original = module.forward
        module.forward = lambda x: original(x) + 1
        call(guard)
        if way == "deleted":
            del module.forward
        else:
            module.forward = original
        assert [type(part) for part in lens.modules()] == before
        assert lens.__dict__ == attributes
        assert torch.equal(call(guard), expected)
        assert refused(lens)
        guard.uninstall()
        assert type(lens) is Lens
        assert "forward" not in lens.__dict__

    def test_deleted_twice(self, module):
        """As without a guard."""
        with pytest.raises(AttributeError, match="forward"):
            del module.forward

    def test_uninstalled(self, guard, module, lens):
        """What was put there is given back, and what it calls runs without a guard."""
        original, expected = module.forward, guard_free(lens)(X)
        module.forward = newer = lambda x: original(x) + 1
        call(guard)
        guard.uninstall()
        assert lens.__dict__["forward"] is newer
        assert torch.equal(lens(X), expected + 1)
        lens.forward = original
        assert torch.equal(lens(X), expected)

    def test_one_over_another(self, guard, module, lens):
        """Each takes back what it found."""
        expected = guard_free(lens)(X)
        first = module.forward
        module.forward = lambda x: first(x) + 1
        second = module.forward
        module.forward = lambda x: 2 * second(x)
        assert torch.equal(call(guard), 2 * (expected + 1))
        module.forward = second
        assert torch.equal(call(guard), expected + 1)
        module.forward = first
        assert torch.equal(call(guard), expected)
        assert "forward" not in lens.__dict__
        assert (guard.count(), guard.violations) == (3, ())

    @pytest.mark.parametrize("way", WAYS)
    def test_one_that_stood_there_before_it_was_guarded(self, lens, way):
        """Is what is put back, as the same object."""
        older = lens.forward = functools.partial(Lens.forward, lens)
        guard = guard_module(lens)
        module = WAYS[way](guard)
        saved = module.forward
        module.forward = lambda x: saved(x) + 1
        call(guard)
        module.forward = saved
        assert lens.forward.__wrapped__ is older
        guard.uninstall()
        assert lens.__dict__["forward"] is older


class TestSavedForwards:
    """What was read from the proxy before: a part of the call when what replaced it calls it."""

    def test_called_outside(self, guard):
        """A call of its own, whatever stands there now."""
        saved = guard.module.forward
        with pytest.raises(NoContext):
            saved(X)
        guard.module.forward = lambda x: x + 1
        assert not torch.equal(call(guard, saved), X + 1)
        assert guard.count() == 1

    def test_a_re_entry_stays_one(self, guard, lens):
        """Of a forward that nobody has replaced, and of the module itself, whatever runs."""
        saved = guard.module.forward
        handle = lens.extras["norm"].register_forward_hook(lambda *_: saved(X))
        with pytest.raises(ReentrantCall):
            call(guard)
        handle.remove()
        guard.module.forward = lambda x: guard.module(x)
        with pytest.raises(ReentrantCall):
            call(guard)
        guard.module.forward = newer = lambda x: guard.module.forward(x)
        with pytest.raises(ReentrantCall):
            call(guard)
        assert guard.module.forward.__wrapped__ is newer

    def test_set_back_inside(self, guard):
        """As trainers do that redirect a forward: patched, called, set back, and then run."""
        module, seen = guard.module, []

        def method(x):
            seen.append(module.forward(x))
            return module.blocks[0](x)

        def redirected(x):
            original = module.forward

            def patched(*args):
                module.forward = original
                return method(*args)

            module.forward = patched
            return module(x)

        for _ in range(2):
            call(guard, redirected)
        assert (guard.count(), guard.violations) == (2, ())
        assert torch.equal(seen[0], call(guard))

    def test_replaced_inside_a_running_call(self, lens):
        """As in a method that is a call: what stands there now is what has replaced it."""

        class Redirects(Lens):
            def redirect(self, x, proxy):
                original = proxy.forward
                proxy.forward = lambda x: original(x) + 1
                try:
                    return self(x)
                finally:
                    proxy.forward = original

        module = Redirects()
        expected = module(X) + 1
        guard = guard_module(module, policy=CallPolicy({"s": 1}, methods=("redirect",)))
        with guard.context("inference"):
            assert torch.equal(guard.module.redirect(X, guard.module), expected)
        assert (guard.count(), guard.violations) == (1, ())

    def test_after_uninstall(self, guard, lens):
        """One that was saved runs freely; one that is fetched anew from the proxy is checked."""
        saved = guard.module.forward
        guard.uninstall()
        assert torch.equal(saved(X), lens(X))
        with pytest.raises(NoContext):
            guard.module.forward(X)

    @pytest.mark.parametrize("reentrant", [False, True])
    @pytest.mark.parametrize("set_back", [False, True])
    def test_checkpointed(self, guard, module, reentrant, set_back):
        """What a checkpoint repeats of the original is a part of the call that was."""
        original = module.forward

        def patched(x):
            if set_back:
                module.forward = original
            return checkpoint(original, x, use_reentrant=reentrant)

        module.forward = patched
        x = X.clone().requires_grad_()
        with guard.context("training"), guard.sanctioned("s"):
            out = guard.module(x)
        out.sum().backward()
        assert (guard.count(), guard.violations) == (1, ())
        assert x.grad is not None

    @pytest.mark.parametrize("reentrant", [False, True])
    def test_recomputed_itself(self, guard, module, reentrant):
        """A checkpoint around the call repeats the call, with the forward that stands there."""
        original = module.forward
        module.forward = lambda x: original(x) + 1
        x = X.clone().requires_grad_()
        with guard.context("training"), guard.sanctioned("s"):
            out = checkpoint(guard.module, x, use_reentrant=reentrant)
        out.sum().backward()
        assert [(c.kind, c.recompute_of) for c in guard.calls] == [("call", None), ("recompute", 1)]

    def test_what_else_a_method_has(self, guard, lens):
        """accelerate asks for the function behind it, to bind it anew."""
        saved = guard.module.forward
        assert saved.__self__ is lens
        guard.module.forward = types.MethodType(
            torch.autocast("cpu", torch.bfloat16)(saved.__func__), guard.module
        )
        assert call(guard).dtype is torch.bfloat16
        assert guard.violations == ()


PUTS = {
    "a bound method": lambda m: setattr(m, "forward", types.MethodType(Lens.forward, m)),
    "the saved one": lambda m: setattr(m, "kept", m.forward),
    "a partial of the saved one": lambda m: setattr(
        m, "forward", functools.partial(lambda run, x: run(x), m.forward)
    ),
    "a hook of accelerate's": lambda m: add_hook_to_module(m, ModelHook()),
    "hooks on all parts": lambda m: add_hooks(m),
}
COPIES = {
    "of the proxy": lambda guard: copy.deepcopy(guard.module),
    "of a copy": lambda guard: copy.deepcopy(copy.deepcopy(guard.module)),
    "of an owner": lambda guard: copy.deepcopy([guard.module.__wrapped__, guard.module])[1],
}


def add_hooks(module):
    for part in module.modules():
        if isinstance(part, (nn.Linear, nn.LayerNorm)):
            add_hook_to_module(part, ModelHook())


class TestCopies:
    """A copy runs its own weights: never a function that is bound to the original."""

    @pytest.mark.parametrize("mode", ["enforce", "observe"])
    @pytest.mark.parametrize("make", COPIES)
    @pytest.mark.parametrize("put", PUTS)
    @pytest.mark.parametrize("way", WAYS)
    def test_run_their_own_weights(self, lens, way, put, make, mode):
        """Under a guard of their own, also when the original's is gone."""
        guard = guard_module(lens, mode=mode)
        PUTS[put](WAYS[way](guard))
        expected = call(guard)
        copied = COPIES[make](guard)
        mine = guard_of(copied)
        with torch.no_grad():
            copied.extras["norm"].bias.add_(100)
        assert torch.allclose(call(mine), expected + 100, atol=1e-4)
        assert torch.equal(call(guard), expected)
        if put == "the saved one":
            assert torch.allclose(call(mine, copied.kept), expected + 100, atol=1e-4)
        assert (guard.violations, mine.violations) == ((), ())
        assert (guard.count(), mine.count()) == (2, 2 if put == "the saved one" else 1)
        guard.uninstall()
        assert torch.allclose(call(mine), expected + 100, atol=1e-4)
        assert torch.equal(lens(X), expected)

    @pytest.mark.parametrize("decorate", [lambda run: run, torch.no_grad()])
    @pytest.mark.parametrize("mode", ["enforce", "observe"])
    @pytest.mark.parametrize("way", WAYS)
    def test_of_a_function_run_the_original_and_are_seen_to(self, lens, way, mode, decorate):
        """Python copies a closure as it is: refused, also where both could be called."""
        guard = guard_module(lens, mode=mode)
        module = WAYS[way](guard)
        original = module.forward

        def forward(x, run=True, *, scale=1):  # it refers to itself, too
            return scale * (original(x) if run else forward(x))

        module.forward = decorate(forward)
        expected = call(guard)
        copied = copy.deepcopy(guard.module)
        with torch.no_grad():
            copied.extras["norm"].bias.add_(100)
        with guard.context("inference"):
            if mode == "enforce":
                with pytest.raises(BypassedGuard):
                    call(guard_of(copied))
            else:
                assert torch.equal(call(guard_of(copied)), expected)
        assert [record.reason for record in guard.violations] == ["BypassedGuard"]
        assert torch.equal(call(guard), expected)

    def test_pickled(self, guard, lens):
        """What the class has itself is not saved, nor what the guard has put around it."""
        guard.module.kept = guard.module.forward
        loaded = pickle.loads(pickle.dumps(lens))
        assert loaded.kept == loaded.forward
        assert type(loaded) is Lens
        assert torch.equal(loaded.kept(X), call(guard))


class TestAccelerate:
    @pytest.mark.parametrize("append", [False, True])
    def test_hooks_come_and_go(self, guard, module, lens, append):
        """They run in each call; afterwards nothing of them is left."""
        expected, attributes = guard_free(lens)(X), lens.__dict__.copy()
        add_hook_to_module(module, Doubles(), append=append)
        if append:
            add_hook_to_module(module, Doubles(), append=append)
        assert torch.equal(call(guard), (4 if append else 2) * expected)
        assert refused(lens)
        assert refused(lens.forward)
        remove_hook_from_module(module)
        assert lens.__dict__ == attributes
        assert torch.equal(call(guard), expected)
        assert (guard.count(), len(guard.violations)) == (2, 2)

    def test_uninstalled_with_its_hook(self, guard, module, lens):
        """The hook stays, and what it saved is the module's own forward."""
        expected = guard_free(lens)(X)
        add_hook_to_module(module, Doubles())
        guard.uninstall()
        assert torch.equal(lens(X), 2 * expected)
        assert lens._old_forward == types.MethodType(Lens.forward, lens)
        remove_hook_from_module(lens)
        assert torch.equal(lens(X), expected)

    def test_on_a_part(self, guard, lens):
        """Where device maps put them."""
        expected = guard_free(lens)(X)
        add_hook_to_module(lens.blocks[0].linear, Doubles())
        assert not torch.equal(call(guard), expected)
        assert refused(lens.blocks[0].linear)
        remove_hook_from_module(lens.blocks[0].linear)
        assert torch.equal(call(guard), expected)


class TestPromptTuning:
    """PEFT's prompt tuning runs the base model's forward while its adapter is off."""

    class Prompted(nn.Module):
        def __init__(self, base):
            super().__init__()
            self.base = base
            self.prompt = nn.Parameter(torch.ones(3))

        def forward(self, x):
            return self.base(x + self.prompt)

        @contextlib.contextmanager
        def disable_adapter(self):
            old = self.forward
            self.forward = self.base.forward
            try:
                yield
            finally:
                self.forward = old

    def test_is_one_call(self, lens):
        """With the adapter and without, and a copy in the midst of it runs its own."""
        expected = guard_free(lens)(X)
        module = self.Prompted(lens)
        guard = guard_module(module)
        with guard.module.disable_adapter():
            assert torch.equal(call(guard), expected)
            copied = copy.deepcopy(guard.module)
            with torch.no_grad():
                copied.base.extras["norm"].bias.add_(100)
            assert torch.allclose(call(guard_of(copied)), expected + 100, atol=1e-4)
            assert refused(module)
        assert not torch.equal(call(guard), expected)
        assert "forward" not in module.__dict__
        assert (guard.count(), len(guard.violations)) == (2, 1)

    def test_uninstalled_in_the_midst_of_it(self, lens):
        """What was put there is the part's own forward."""
        module = self.Prompted(lens)
        guard = guard_module(module)
        with guard.module.disable_adapter():
            guard.uninstall()
            assert module.__dict__["forward"] == types.MethodType(Lens.forward, lens)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning:torch")
class TestCompiled:
    @pytest.fixture(autouse=True)
    def _fresh_compiler(self):
        torch._dynamo.reset()
        yield
        torch._dynamo.reset()

    class Small(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(3, 3)

        def forward(self, x):
            return self.linear(x).sin()

    @pytest.mark.parametrize("way", WAYS)
    def test_a_compiled_forward(self, way):
        """As model cards have it: `model.forward = torch.compile(model.forward)`."""
        count, module = CompileCounter(), self.Small()
        expected = module(X)
        guard = guard_module(module)
        target = WAYS[way](guard)
        target.forward = torch.compile(target.forward, backend=count)
        for _ in range(4):
            with guard.context("inference"):
                torch.testing.assert_close(guard.module(X), expected)
        assert (guard.count(), guard.violations) == (4, ())
        assert count.frame_count == 1
        assert refused(module)
        assert refused(module.forward)

    def test_attributes_that_a_forward_sets(self):
        """A module that writes to itself compiles as it does without a guard."""

        class Writes(self.Small):
            def forward(self, x):
                self.seen = x
                del self.seen
                self.kept = x
                return super().forward(x)

        graphs = {}
        for guarded in (False, True):
            torch._dynamo.reset()
            count, module = CompileCounter(), Writes()
            module.compile(backend=count)
            guard = guard_module(module)
            if not guarded:
                guard.uninstall()
            for _ in range(4):
                with guard.context("inference"):
                    (guard.module if guarded else module)(X)
            graphs[guarded] = count.frame_count
            assert torch.equal(module.kept, X)
        assert graphs[True] == graphs[False]
