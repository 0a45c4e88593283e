"""Methods that are fetched through the proxy let in what they run of the module."""

import asyncio
import copy
import functools
import inspect
import threading

import pytest
import torch
import transformers
from tests.lensnet_guard.boundary.lens import guard_free
from tests.lensnet_guard.boundary.methods import Net
from tests.lensnet_guard.helpers import X
from torch import nn
from torch.utils.checkpoint import checkpoint

from lensnet_guard import (
    BudgetExceeded,
    BypassedGuard,
    CallPolicy,
    NoContext,
    Scope,
    UnsanctionedCall,
    guard_module,
    guard_of,
)


@pytest.fixture
def net():
    torch.manual_seed(0)
    return Net()


@pytest.fixture
def guard(net):
    return guard_module(net, policy=CallPolicy({"s": 1}))


class TestFetchedThroughTheProxy:
    """`generate` of a model runs on the raw module, and every forward in it was a bypass."""

    def test_each_forward_is_a_call(self, guard, net):
        """By the same rule as any other, with the line that called the method among its frames."""
        expected = guard_free(net).generate(X, steps=3)
        with guard.context("inference"):
            assert torch.equal(guard.module.generate(X, steps=3), expected)
        assert guard.count("inference") == 4
        assert guard.violations == ()
        assert [call.method for call in guard.calls] == [None] * 4
        assert any(f.function.endswith("is_a_call") for f in guard.calls[0].stack())

    def test_in_training(self, guard):
        """Outside a scope unsanctioned, in one counted; and never a bypass."""
        with pytest.raises(UnsanctionedCall), guard.context("training"):
            guard.module.generate(X)
        with guard.context("training"), guard.sanctioned("s"):
            guard.module.generate(X, steps=0)
        with pytest.raises(BudgetExceeded), guard.context("training"), guard.sanctioned("s"):
            guard.module.generate(X)
        with pytest.raises(NoContext):
            guard.module.generate(X)
        assert guard.count() == 2

    def test_a_refused_call_runs_no_hook(self, guard, net):
        """It never reaches the module."""
        seen = []
        net.register_forward_pre_hook(lambda *_: seen.append(1))
        with pytest.raises(NoContext):
            guard.module.generate(X)
        with guard.context("inference"):
            guard.module.generate(X, steps=1)
        assert seen == [1]

    def test_parts_run_alone_are_refused(self, guard):
        """The method came through the front door, and the part did not."""
        with pytest.raises(BypassedGuard, match="linear was run alone"), guard.context("inference"):
            guard.module.by_parts(X)

    def test_of_the_raw_module_it_is_a_bypass_as_ever(self, guard, net):
        """Before, after, and by a method that was fetched from there."""
        for run in (net.generate, guard.module.me().generate, guard.module.__wrapped__.generate):
            with pytest.raises(BypassedGuard), guard.context("inference"):
                run(X)
            with guard.context("inference"):
                guard.module.generate(X)

    def test_methods_of_every_module_are_no_doors(self, guard):
        """`_call_impl` is how torch calls a module, and `apply` runs nothing of it."""
        with pytest.raises(BypassedGuard), guard.context("inference"):
            guard.module._call_impl(X)
        with pytest.raises(BypassedGuard), guard.context("inference"):
            guard.module.as_torch_does(X)
        with pytest.raises(BypassedGuard), guard.context("inference"):
            guard.module.apply(lambda module: module(X))

    def test_self_is_the_raw_module(self, guard, net):
        """Exactly as without a guard, so that super() and private names work."""
        assert guard.module.me() is net

    def test_nested_and_recursive(self, guard):
        """The door stands open until the outermost method has returned."""
        with guard.context("inference"):
            guard.module.recursive(X, 3)
            guard.module.in_thread(lambda net, x: guard.module.generate(x) + net(x), X)
        assert guard.count() == 3 + 3 + 1

    def test_a_method_that_raises(self, guard, net):
        """Leaves no door open behind it."""
        with guard.context("inference"):
            with pytest.raises(ZeroDivisionError):
                guard.module.fails(X)
            with pytest.raises(BypassedGuard):
                net(X)
        assert guard.count() == 1

    def test_in_another_thread(self, guard, in_thread):
        """The method may run in any thread; it lets in what its own thread runs, and no other."""
        with guard.context("inference"):
            in_thread(guard.carry(guard.module.generate), X)
            with pytest.raises(BypassedGuard):
                guard.module.in_thread(lambda net, x: in_thread(guard.carry(net), x), X)
        assert guard.count() == 3

    def test_two_threads_at_once(self, guard, net):
        """One that runs a method does not let the other's bypass in."""
        inside, over, refused = threading.Event(), threading.Event(), []

        def bypass():
            inside.wait(30)
            try:
                net(X)
            except BypassedGuard:
                refused.append(1)
            over.set()

        thread = threading.Thread(target=guard.carry(bypass))
        thread.start()
        with guard.context("inference"):
            guard.module.in_thread(lambda net, x: (inside.set(), over.wait(30), net(x)), X)
        thread.join()
        assert refused == [1]
        assert guard.count() == 1

    def test_inside_a_running_call(self, guard):
        """What a hook runs by a method is a part of the call, as what it runs by `self`."""
        guard.module.register_forward_hook(
            lambda net, *_: net.linear is guard.module.by_parts(X) or None, always_call=False
        )
        with guard.context("inference"):
            guard.module(X)
        assert (guard.count(), guard.violations) == (1, ())

    def test_a_decorated_method(self, guard):
        """As `generate` of Hugging Face models is."""
        with guard.context("inference"):
            assert not guard.module.without_grad(X).requires_grad
        assert guard.count() == 1

    def test_when_the_guard_is_gone(self, guard, net):
        """What was fetched before runs as it would have without one."""
        generate = guard.module.generate
        guard.uninstall()
        assert torch.equal(generate(X), net.generate(X))
        assert guard.calls == ()

    def test_of_a_copy(self, guard, net):
        """A copy that has kept one on itself runs itself, under its own guard."""
        guard.module.kept = guard.module.generate
        copied = copy.deepcopy(guard.module)
        with torch.no_grad():
            copied.linear.bias.add_(100)
        with guard_of(copied).context("inference"):
            assert copied.kept(X).mean() > 30
        assert (guard_of(copied).count(), guard.count()) == (3, 0)
        guard.uninstall()
        assert net.__dict__["kept"] == net.generate

    @pytest.mark.parametrize("reentrant", [False, True])
    @pytest.mark.parametrize("where", ["around the method", "in the method"])
    def test_recomputed(self, guard, net, where, reentrant):
        """A forward that was a call is the recompute of that call."""
        net.checkpointed = lambda x: checkpoint(net, x, use_reentrant=reentrant)
        x = X.clone().requires_grad_()
        with guard.context("training"), guard.sanctioned("s"):
            if where == "in the method":
                out = guard.module.in_thread(lambda net, x: net.checkpointed(x), x)
            else:
                out = checkpoint(guard.module.generate, x, 0, use_reentrant=reentrant)
        out.sum().backward()
        assert [(c.kind, c.recompute_of) for c in guard.calls] == [
            *[("call", None), ("recompute", 1)],
        ]
        assert guard.violations == ()


class TestLooksLikeTheMethod:
    def test_bound_method(self, guard, net):
        """For whoever asks what it is."""
        generate, plain = guard.module.generate, net.generate
        assert inspect.ismethod(generate)
        assert generate.__self__ is net
        for name in ("__name__", "__qualname__", "__doc__", "__module__", "flag"):
            assert getattr(generate, name) == getattr(plain, name)
        assert generate.__func__.__wrapped__ is Net.generate
        assert inspect.signature(generate) == inspect.signature(plain)
        assert generate == guard.module.generate

    def test_what_is_no_method_is_as_it_was(self, guard, net):
        """Properties, static and class methods, parts, weights, and methods of every module."""
        assert guard.module.size == 3
        assert guard.module.scale is Net.scale
        assert guard.module.make.__self__ is type(net)
        assert type(guard.module.make()) is Net
        assert guard.module.linear is net.linear
        assert guard.module.linear.weight is net.linear.weight
        assert guard.module.parameters == net.parameters
        assert guard.module.linear.reset_parameters.__func__ is nn.Linear.reset_parameters

    def test_a_method_that_was_patched(self, guard, monkeypatch):
        """What is fetched is what stands there now."""
        guard.module.generate  # noqa: B018
        monkeypatch.setattr(Net, "generate", lambda self, x: self(x) + 1)
        with guard.context("inference"):
            guard.module.generate(X)
        assert guard.count() == 1

    def test_a_method_on_the_instance(self, guard, net):
        """As libraries patch models."""
        net.generate = functools.partial(Net.generate, net).func.__get__(net)
        with guard.context("inference"):
            guard.module.generate(X)
        assert guard.count() == 3

    @pytest.mark.parametrize(
        "is_one", [inspect.iscoroutinefunction, inspect.isgeneratorfunction, inspect.isroutine]
    )
    @pytest.mark.parametrize("name", ["agenerate", "stream", "streams", "generate"])
    def test_its_kind(self, guard, net, name, is_one):
        """Who asks whether it must be awaited, or iterated over, is told the same."""
        assert is_one(getattr(guard.module, name)) == is_one(getattr(net, name))


class TestThatGoOn:
    """Methods whose body runs after they have returned."""

    @pytest.mark.parametrize("name", ["stream", "streams"])
    def test_generators(self, guard, net, name):
        """The door is open while the body runs, and not in the code that iterates over it."""
        with guard.context("inference"):
            stream = getattr(guard.module, name)(X)
            first = next(stream)
            with pytest.raises(BypassedGuard):
                net(X)
            second = stream.send(first)
            with pytest.raises(StopIteration) as stop:
                stream.send(None)
        assert stop.value.value == "over"
        assert torch.equal(second, guard_free(net)(first))
        assert guard.count() == 2

    def test_a_generator_is_thrown_at_and_closed(self, guard, net):
        """Its own `except` and `finally` run, with the door open."""
        seen = []

        def watched(net, x):
            try:
                try:
                    yield net(x)
                except KeyError as error:
                    seen.append(error.args)
                    yield net(x)
            finally:
                seen.append(net(x).shape)

        net.watched = watched.__get__(net)
        with guard.context("inference"):
            stream = guard.module.watched(X)
            next(stream)
            stream.throw(KeyError("told"))
            stream.close()
            with pytest.raises(BypassedGuard):
                net(X)
        assert seen == [("told",), X.shape]
        assert guard.count() == 3

    def test_coroutines(self, guard, net):
        """The door is open in its task, and not in one that runs between two of its steps."""
        refused = []

        async def bypass():
            for _ in range(3):
                await asyncio.sleep(0)
                try:
                    net(X)
                except BypassedGuard:
                    refused.append(1)

        async def main():
            with guard.context("inference"):
                return (await asyncio.gather(guard.module.agenerate(X, 3), bypass()))[0]

        expected = guard_free(net).generate(X, 2)
        assert torch.equal(asyncio.run(main()), expected)
        assert (guard.count(), refused) == (3, [1, 1, 1])

    def test_a_coroutine_s_own_tasks(self, guard):
        """They are let in as long as it runs, for it is they that do its work."""

        async def main():
            with guard.context("inference"):
                return await guard.module.gathered(X)

        asyncio.run(main())
        assert (guard.count(), guard.violations) == (2, ())

    def test_a_task_that_outlives_its_method(self, guard, net):
        """Is not let in any more."""

        async def main():
            go = asyncio.Event()

            async def later():
                await go.wait()
                net(X)

            async def starts(net):
                return asyncio.create_task(later())

            net.starts = starts.__get__(net)
            with guard.context("inference"):
                task = await guard.module.starts()
                go.set()
                await task

        with pytest.raises(BypassedGuard):
            asyncio.run(main())

    def test_asynchronous_generators(self, guard, net):
        """As the others."""

        async def main():
            with guard.context("inference"):
                stream = guard.module.astream(X)
                first = await anext(stream)
                with pytest.raises(BypassedGuard):
                    net(X)
                await stream.asend(first)
                await stream.aclose()
                async for _ in guard.module.astream(X):
                    break

        asyncio.run(main())
        assert guard.count() == 3

    def test_carried_to_another_thread(self, guard, in_thread):
        """`carry` knows a coroutine function, and refuses a generator function."""
        with guard.context("inference"):
            run = guard.carry(guard.module.agenerate)
            with pytest.raises(TypeError, match="carry binds a call"):
                guard.carry(guard.module.stream)
        in_thread(lambda: asyncio.run(run(X)))
        assert guard.count("inference") == 2


class TestGenerate:
    """Of Hugging Face's models, which TRL calls on teachers and references."""

    @pytest.fixture
    def model(self):
        torch.manual_seed(0)
        config = transformers.LlamaConfig(
            vocab_size=64,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            pad_token_id=0,
            eos_token_id=None,
        )
        return transformers.LlamaForCausalLM(config).eval()

    @pytest.mark.parametrize("beams", [1, 2])
    def test_works_without_configuration(self, model, beams):
        """Each forward in it is a call of the inference context."""
        ids = torch.randint(1, 64, (2, 5))
        options = {"max_new_tokens": 4, "do_sample": False, "num_beams": beams}
        expected = model.generate(ids, **options)
        guard = guard_module(model, policy=CallPolicy({"s": 1}))
        with guard.context("inference"):
            assert torch.equal(guard.module.generate(ids, **options), expected)
        assert (guard.count("inference"), guard.violations) == (4, ())
        with pytest.raises(UnsanctionedCall), guard.context("training"):
            guard.module.generate(ids, **options)

    def test_is_one_call_where_the_policy_says_so(self, model):
        """With all its forwards."""
        policy = CallPolicy({"s": Scope((0, 4))}, methods=("generate",))
        guard = guard_module(model, policy=policy)
        with guard.context("training"), guard.sanctioned("s"):
            guard.module.generate(torch.randint(1, 64, (2, 5)), max_new_tokens=4)
        assert [call.method for call in guard.calls] == ["generate"]
