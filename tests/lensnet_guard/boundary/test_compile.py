"""torch.compile: every call is recorded and refused rightly, with at most one graph break."""

import copy
import gc
import inspect
import weakref
from types import FunctionType

import pytest
import torch
from tests.lensnet_guard.helpers import SCOPE, X
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch._dynamo.utils import counters
from torch.utils.checkpoint import checkpoint

from lensnet_guard import (
    BudgetExceeded,
    BypassedGuard,
    CallPolicy,
    NoContext,
    UnsanctionedCall,
    guard_module,
    lensnet_guard,
)

# Importing inductor, and loading what it has compiled, warns of torch's own old ways.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning:torch")


@pytest.fixture(autouse=True)
def _fresh_compiler():
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


@pytest.fixture(params=["eager", "aot_eager", "inductor"])
def backend(request):
    """Counts the graphs that it compiles, in ``frame_count``."""
    return CompileCounterWithBackend(request.param)


@pytest.fixture
def count():
    return CompileCounterWithBackend("eager")


@pytest.fixture
def lens():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 3), nn.Tanh(), nn.Linear(3, 2))


WHY = "a module guarded by lensnet_guard is called in Python"
# Torch 2.7 names the function that stands in the way of a graph, and not yet the reason given.
TELLS_WHY = "reason" in inspect.signature(torch.compiler.disable).parameters


def graph_breaks():
    return dict(counters["graph_break"])


class TestCompiledThenGuarded:
    """``module.compile(); guard_module(module)``: the way to have both."""

    def test_every_call_is_recorded(self, lens, backend):
        """Without a graph break or a recompile, and with the right result."""
        expected = copy.deepcopy(lens)(X)
        lens.compile(backend=backend)
        guard = guard_module(lens)
        with guard.context("inference"):
            for _ in range(5):
                torch.testing.assert_close(guard.module(X), expected)
        assert guard.count() == 5
        assert backend.frame_count == 1
        assert graph_breaks() == {}

    def test_whole_training_steps(self, lens, backend):
        """Forward in the scope, backward after it; step after step the same code."""
        lens.compile(backend=backend)
        guard = guard_module(lens)
        with guard.context("training"):
            for step in range(4):
                with guard.micro_step(step), guard.sanctioned(SCOPE):
                    loss = guard.module(X).sum()
                loss.backward()
        assert guard.count("training", SCOPE) == 4
        assert backend.frame_count == 1
        assert graph_breaks() == {}

    def test_refusals(self, lens, count):
        """The compiled module is not reached either."""
        lens.compile(backend=count)
        guard = guard_module(lens)
        with pytest.raises(UnsanctionedCall), guard.context("training"):
            guard.module(X)
        assert count.frame_count == 0

    def test_fullgraph(self, lens, count):
        """What is compiled has no guard in it."""
        lens.compile(backend=count, fullgraph=True)
        guard = guard_module(lens)
        with guard.context("inference"):
            guard.module(X)
        assert count.frame_count == 1

    def test_bypass(self, lens, backend):
        """Also when the legal call has been compiled long since, and legal calls go on after."""
        lens.compile(backend=backend)
        guard = guard_module(lens)
        with guard.context("inference"):
            guard.module(X)
            for way in (lens, guard.module.__wrapped__, lens._call_impl, lens[0], lens.forward):
                with pytest.raises(BypassedGuard):
                    way(X)
            guard.module(X)
        assert guard.count() == 2
        assert len(guard.violations) == 5

    def test_run_before_it_was_guarded(self, lens, count):
        """One more compilation, and never an unguarded run."""
        lens.compile(backend=count)
        lens(X)
        guard = guard_module(lens)
        with pytest.raises(BypassedGuard):
            lens(X)
        with guard.context("inference"):
            for _ in range(3):
                guard.module(X)
        assert guard.count() == 3
        assert count.frame_count <= 2

    def test_a_bypass_before_the_first_call_shut_the_door_for_good(self, lens, count):
        """The compiler once kept "not inside" as a constant of the class."""
        lens.compile(backend=count)
        guard = guard_module(lens)
        with pytest.raises(BypassedGuard):
            lens(X)
        with guard.context("inference"):
            guard.module(X)
        assert guard.count() == 1

    def test_in_other_threads(self, lens, count, in_thread):
        """What is compiled in one thread asks again in another."""
        lens.compile(backend=count)
        guard = guard_module(lens)
        with guard.context("inference"):
            guard.module(X)
            in_thread(guard.carry(guard.module), X)
        with pytest.raises(BypassedGuard):
            in_thread(lens, X)
        with guard.context("inference"):
            in_thread(guard.carry(guard.module), X)
        assert guard.count() == 3

    def test_after_uninstall(self, lens, count):
        """The raw module runs again."""
        lens.compile(backend=count)
        guard = guard_module(lens)
        with guard.context("inference"):
            guard.module(X)
        guard.uninstall()
        lens(X)
        assert len(guard.violations) == 0

    def test_compiled_through_the_proxy(self, lens, count):
        """``guard.module.compile()`` compiles the raw module in place: the same."""
        guard = guard_module(lens)
        guard.module.compile(backend=count)
        with guard.context("inference"):
            for _ in range(3):
                guard.module(X)
        assert (guard.count(), count.frame_count) == (3, 1)
        assert graph_breaks() == {}
        with pytest.raises(BypassedGuard):
            lens(X)


class TestCompiledParts:
    """Blocks compiled one by one, as large models are."""

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner, self.outer = nn.Linear(3, 3), nn.Linear(3, 3)

        def forward(self, x):
            return x + self.outer(self.inner(x).sin().relu())

    class Blocks(nn.Module):
        def __init__(self, block, reentrant):
            super().__init__()
            self.blocks = nn.ModuleList([block(), block()])
            self.reentrant = reentrant

        def forward(self, x):
            for block in self.blocks:
                x = checkpoint(block, x, use_reentrant=self.reentrant)
            return x

    @pytest.mark.parametrize("reentrant", [False, True])
    @pytest.mark.parametrize("guarded_first", [False, True])
    def test_the_recompute_of_a_compiled_block_ran_eagerly(self, reentrant, guarded_first):
        """It saved other tensors than the forward had, which torch refuses; now it is compiled."""
        graphs = {}
        for guarded in (False, True):
            torch._dynamo.reset()
            counter = CompileCounterWithBackend("aot_eager")
            module = self.Blocks(self.Block, reentrant)
            guard = guard_module(module) if guarded and guarded_first else None
            for block in module.blocks:
                block.compile(backend=counter)
            guard = guard or (guard_module(module) if guarded else None)
            for _ in range(3):
                x = X.clone().requires_grad_()
                if guard is None:
                    out = module(x)
                else:
                    with guard.context("training"), guard.sanctioned(SCOPE):
                        out = guard.module(x)
                out.sum().backward()
            graphs[guarded] = counter.frame_count
        assert graphs[True] == graphs[False]

    def test_a_bypass_of_a_compiled_block(self, count):
        """Outside a recompute it is refused, compiled or not."""
        module = self.Blocks(self.Block, False)
        module.blocks[0].compile(backend=count)
        guard_module(module)
        for _ in range(2):
            with pytest.raises(BypassedGuard):
                module.blocks[0](X)


class TestManyClasses:
    def test_the_recompile_limit_was_shared_by_all_guarded_classes(self, count):
        """Torch counts recompiles by code object, and gives up after eight.

        Each has a forward of its own; else torch 2.14 gives up on them without a guard as well.
        """

        def forward(self, x):
            return nn.functional.linear(x, self.weight)

        for number in range(12):
            own = FunctionType(forward.__code__.replace(), globals())
            module = type(f"Lens{number}", (nn.Linear,), {"forward": own})(3, 2)
            module.compile(backend=count)
            guard = guard_module(module)
            with guard.context("inference"):
                guard.module(X)
        assert count.frame_count == 12

    def test_a_decorated_forward_was_looked_through(self):
        """The compiler went to the function behind ``@torch.compile``, past the tripwire."""

        class Decorated(nn.Module):
            def __init__(self):
                super().__init__()
                self.weight = nn.Parameter(torch.ones(3))

            @torch.compile(backend="eager")
            def forward(self, x):
                return x * self.weight

        module = Decorated()
        guard = guard_module(module)
        with pytest.raises(BypassedGuard):
            torch.compile(lambda x: module(x), backend="eager")(X)
        with guard.context("inference"):
            guard.module(X)
        assert guard.count() == 1

    def test_super_never_ended(self, count):
        """The compiler took the armed class for the class whose bases it looked through."""

        class Wider(nn.Linear):
            def forward(self, x):
                return super().forward(x) + 1

        module = Wider(3, 2)
        expected = module(X)
        module.compile(backend=count)
        guard = guard_module(module)
        with guard.context("inference"):
            for _ in range(3):
                torch.testing.assert_close(guard.module(X), expected)
        assert (guard.count(), count.frame_count) == (3, 1)
        assert graph_breaks() == {}

    def test_compiled_modules_were_never_freed(self, lens, count):
        """The compiler keeps classes; an armed one kept its module, also after `uninstall`."""
        lens.compile(backend=count)
        guard = guard_module(lens)
        with guard.context("inference"):
            guard.module(X)
        guard.uninstall()
        gone = weakref.ref(guard)
        del guard
        gc.collect()
        assert gone() is None


class TestCompiledBeforeItWasGuarded:
    def test_a_compiled_wrapper_of_the_module(self, lens, backend):
        """``torch.compile(module)`` made and run before: refused from then on, not silent."""
        compiled = torch.compile(lens, backend=backend)
        compiled(X)
        guard = guard_module(lens)
        with pytest.raises(BypassedGuard), guard.context("inference"):
            compiled(X)
        assert guard.count() == 0

    def test_a_compiled_function_that_calls_it(self, lens, backend):
        """The code compiled without a guard is not run again."""

        @torch.compile(backend=backend)
        def step(x):
            return lens(x * 2) + 1

        step(X)
        guard = guard_module(lens)
        with pytest.raises(BypassedGuard, match="step"), guard.context("inference"):
            step(X)
        guard.uninstall()
        step(X)

    def test_a_compiled_owner(self, lens, backend):
        """Its attribute is the proxy from now on, and its calls are recorded."""
        owner = nn.Module()
        owner.lensnet = lens

        @torch.compile(backend=backend)
        def step(x):
            return owner.lensnet(x * 2) + 1

        expected = step(X)
        with lensnet_guard(owner) as guard:
            with guard.context("inference"):
                for _ in range(3):
                    torch.testing.assert_close(step(X), expected)
            assert guard.count() == 3
            with pytest.raises(NoContext):
                step(X)
            guard._history.violation_count = 0
        torch.testing.assert_close(step(X), expected)
        assert guard.count() == 3


class TestCalledInsideACompiledFunction:
    def test_every_call_is_recorded(self, lens, backend):
        """At the price of one graph break, and of no recompile."""
        guard = guard_module(lens)

        @torch.compile(backend=backend)
        def step(x):
            return guard.module(x * 2) + 1

        with guard.context("inference"):
            step(X)
            compiled = backend.frame_count
            for _ in range(20):
                step(X)
        assert guard.count() == 21
        assert backend.frame_count == compiled == 2  # what stands before the call, and after it
        ((reason, times),) = graph_breaks().items()
        assert times == 1
        assert (WHY if TELLS_WHY else "GuardedModule.__call__") in reason

    def test_the_result_and_the_gradient(self, lens, backend):
        """As without a compiler and without a guard."""
        free = copy.deepcopy(lens)
        guard = guard_module(lens)

        @torch.compile(backend=backend)
        def loss(module, x):
            return module(x * 2).square().mean()

        expected = free(X * 2).square().mean()
        expected.backward()
        with guard.context("training"), guard.sanctioned(SCOPE):
            found = loss(guard.module, X)
        found.backward()
        torch.testing.assert_close(found, expected)
        torch.testing.assert_close(lens[0].weight.grad, free[0].weight.grad)

    def test_calls_whose_result_is_unused(self, lens, backend):
        """A compiler may not remove what must be counted."""
        guard = guard_module(lens)

        @torch.compile(backend=backend)
        def step(x):
            guard.module(x)
            return x + 1

        with guard.context("inference"):
            for _ in range(3):
                step(X)
        assert guard.count() == 3

    def test_equal_calls_are_not_merged(self, lens, backend):
        """Two are two, and the second is one too many."""
        guard = guard_module(lens)

        @torch.compile(backend=backend)
        def step(x):
            return guard.module(x) + guard.module(x)

        with pytest.raises(BudgetExceeded), guard.context("training"), guard.sanctioned(SCOPE):
            step(X)
        assert guard.count() == 1

    def test_refused_and_allowed_in_turn(self, lens, backend):
        """The verdict is today's, whatever was compiled yesterday."""
        guard = guard_module(lens)

        @torch.compile(backend=backend)
        def step(x):
            return guard.module(x * 2) + 1

        for _ in range(3):
            with guard.context("inference"):
                step(X)
            with pytest.raises(UnsanctionedCall, match="step"), guard.context("training"):
                step(X)
            with guard.context("training"), guard.sanctioned(SCOPE):
                step(X)
            with pytest.raises(NoContext):
                step(X)
        assert (guard.count("inference"), guard.count("training")) == (3, 3)
        assert backend.frame_count == 2

    def test_scope_opened_inside(self, lens, count):
        """The whole of a training step may be compiled, blocks of the guard and all."""
        guard = guard_module(lens)

        @torch.compile(backend=count)
        def step(number, x):
            with guard.micro_step(number), guard.sanctioned(SCOPE):
                return guard.module(x * 2) + 1

        with guard.context("training"):
            for number in range(12):
                step(number, X)
        assert guard.count("training", SCOPE) == 12
        assert [call.step for call in guard.calls] == list(range(12))

    def test_under_a_checkpoint(self, lens, backend):
        """One call, and its recompute, each time."""
        guard = guard_module(lens)

        @torch.compile(backend=backend)
        def step(x):
            return checkpoint(guard.module, x * 2, use_reentrant=False).sum()

        for _ in range(3):
            with guard.context("training"), guard.sanctioned(SCOPE):
                loss = step(X.clone().requires_grad_())
            loss.backward()
        assert guard.count() == 3
        assert [call.kind for call in guard.calls] == ["call", "recompute"] * 3

    def test_a_module_that_is_compiled_itself(self, lens, count):
        """Goes on running compiled on the other side of the graph break."""
        inner = CompileCounterWithBackend("eager")
        lens.compile(backend=inner)
        guard = guard_module(lens)

        @torch.compile(backend=count)
        def step(x):
            return guard.module(x * 2) + 1

        with guard.context("inference"):
            for _ in range(5):
                step(X)
        assert (guard.count(), count.frame_count, inner.frame_count) == (5, 2, 1)

    def test_bypass(self, lens, backend):
        """A compiled function that was written against the raw module is refused as well."""
        guard = guard_module(lens)

        @torch.compile(backend=backend)
        def step(x):
            return lens[0](x * 2) + 1

        for _ in range(2):
            with pytest.raises(BypassedGuard), guard.context("inference"):
                step(X)

    def test_compiling_the_proxy(self, lens, backend):
        """``torch.compile(guard.module)`` records every call, though it compiles nothing."""
        guard = guard_module(lens)
        compiled = torch.compile(guard.module, backend=backend)
        with guard.context("inference"):
            for _ in range(3):
                compiled(X)
        with pytest.raises(NoContext):
            compiled(X)
        assert guard.count() == 3

    def test_budgets_of_several_calls(self, lens, count):
        """Exact under a compiler too."""
        guard = guard_module(lens, policy=CallPolicy(scopes={"s": 3}))

        @torch.compile(backend=count)
        def three(x):
            for _ in range(3):
                x = guard.module(x) @ torch.ones(2, 3)
            return x

        with guard.context("training"), guard.sanctioned("s"):
            three(X)
        with pytest.raises(BudgetExceeded), guard.context("training"), guard.sanctioned("s"):
            three(X)
            three(X)
        assert guard.count() == 6


class TestFullgraph:
    def test_says_what_to_do(self, lens, count):
        """A call that must be counted in Python cannot be in a full graph: say so."""
        guard = guard_module(lens)

        @torch.compile(backend=count, fullgraph=True)
        def step(x):
            return guard.module(x * 2) + 1

        with pytest.raises(Exception, match=WHY if TELLS_WHY else "GuardedModule") as caught:
            step(X)
        message = " ".join(str(caught.value).split())
        advice = (
            f"{WHY}, so that every call is counted. Compile the module itself before it is guarded "
            "(module.compile(); guard_module(module)) and leave fullgraph=True out around its "
            "callers: they run with one graph break"
        )
        assert (advice in message) is TELLS_WHY
        assert guard.count() == 0

    def test_of_a_bypass(self, lens, count):
        """The raw module in a full graph does not run silently."""
        guard = guard_module(lens)

        @torch.compile(backend=count, fullgraph=True)
        def step(x):
            return lens(x * 2) + 1

        with pytest.raises(Exception, match=WHY if TELLS_WHY else r"Tripwire\._behind"):
            step(X)
        assert guard.count() == 0
