"""Export, TorchScript and fx."""

import copy
import pickle
import re

import pytest
import torch
from tests.lensnet_guard.plumbing.models import SCOPE, Model, X, is_refused
from torch import nn

from lensnet_guard import (
    BudgetExceeded,
    BypassedGuard,
    NoContext,
    guard_module,
    guard_of,
)
from lensnet_guard.boundary.proxy import EAGER


class TestExport:
    def test_of_the_proxy(self, guard, critic):
        """Tracing is one call; the exported program has no guard, and nothing of ours in it."""
        with guard.context("inference"):
            program = torch.export.export(guard.module, (X,), strict=False)
            expected = guard.module(X)
        assert guard.count("inference") == 2
        assert torch.equal(program.module()(X), expected)
        assert set(program.state_dict) == set(critic.state_dict())
        assert guard.count() == 2

    def test_of_a_model(self, guard):
        """A model that holds the guarded module is exported with it, and with its names."""
        model = Model(guard.module)
        with guard.context("inference"):
            program = torch.export.export(model, (X,), strict=False)
        assert set(program.state_dict) == set(model.state_dict())
        assert guard.count("inference") == 1

    @pytest.mark.parametrize(("context", "refusal"), [(None, NoContext), ("inference", None)])
    def test_needs_what_a_call_needs(self, guard, context, refusal):
        """Without a context it is refused as itself, and leaves the guard in order."""
        if refusal is not None:
            with pytest.raises(refusal):
                torch.export.export(guard.module, (X,), strict=False)
        with guard.context("inference"):
            guard.module(X)
        assert guard.violation_count == (refusal is not None)

    def test_of_the_raw_module(self, guard, critic):
        """Behind the proxy it is a bypass; after uninstall it is not."""
        with pytest.raises(BypassedGuard), guard.context("inference"):
            torch.export.export(critic, (X,), strict=False)
        guard.uninstall()
        assert torch.export.export(critic, (X,)).module()(X).shape == (2, 2)

    def test_strict(self, guard):
        """It wants one full graph, which a guarded call is not; the message says what to do."""
        # Up to torch 2.9 the way leads round the proxy's graph break, to an error in torch itself.
        why = f"{re.escape(EAGER)}|GuardedModule|Unexpectedly found .* in the outputs"
        with pytest.raises(Exception, match=why), guard.context("inference"):
            torch.export.export(guard.module, (X,), strict=True)

    def test_before_guarding(self, critic):
        """A program exported before has its own copy of the code, which no guard can see."""
        program = torch.export.export(critic, (X,)).module()
        guard = guard_module(critic)
        program(X)
        assert guard.calls == ()

    def test_exported_module_under_a_guard(self, critic):
        """An exported module can be guarded itself, like any other."""
        program = torch.export.export(critic, (X,)).module()
        guard = guard_module(program)
        with guard.context("inference"):
            assert torch.equal(guard.module(X), critic(X))
        assert is_refused(program, X)


@pytest.mark.filterwarnings("ignore:`torch.jit")  # of one class or another
class TestTorchScript:
    @pytest.mark.parametrize("wrap", [lambda proxy: proxy, Model])
    def test_trace(self, guard, wrap):
        """Tracing calls the module, the check of the trace twice more; the trace has no guard."""
        model = wrap(guard.module)
        with guard.context("inference"):
            traced = torch.jit.trace(model, (X,))
            assert torch.equal(traced(X), model(X))
        assert guard.count("inference") == 4
        traced(X)
        assert guard.count() == 4

    def test_trace_in_training(self, guard):
        """Its repeated runs are calls like any other, over the budget."""
        with pytest.raises(BudgetExceeded), guard.context("training"), guard.sanctioned(SCOPE):
            torch.jit.trace(guard.module, (X,))
        assert guard.count() == 1

    def test_trace_of_the_raw_module(self, guard, critic):
        """Behind the proxy it is a bypass."""
        with pytest.raises(BypassedGuard), guard.context("inference"):
            torch.jit.trace(critic, (X,))

    def test_before_guarding(self, critic):
        """A trace or script made before has its own code, which no guard can see."""
        traced = torch.jit.trace(critic, (X,))
        scripted = torch.jit.script(critic.head)
        guard = guard_module(critic)
        traced(X)
        scripted(X)
        assert guard.calls == ()

    @pytest.mark.parametrize("way", ["proxy", "model", "raw", "part", "no globals"])
    def test_script(self, guard, critic, way):
        """A guarded module cannot be scripted, and the message says so."""
        target = {
            "proxy": lambda: guard.module,
            "model": lambda: Model(guard.module),
            "raw": lambda: critic,
            "part": lambda: critic.head,
            "no globals": lambda: guard_module(nn.Identity()).module.__wrapped__,
        }[way]()
        with pytest.raises(Exception, match="guarded by lensnet_guard"):
            torch.jit.script(target)

    @pytest.mark.parametrize("compile_it", [torch.jit.script, lambda m: torch.jit.trace(m, (X,))])
    def test_a_compiled_part(self, compile_it):
        """A guarded module may have parts that run without Python."""
        guard = guard_module(nn.Sequential(compile_it(nn.Linear(3, 2))))
        with guard.context("inference"):
            assert guard.module(X).shape == (2, 2)
        with pytest.raises(NoContext):
            guard.module(X)
        assert guard.count() == 1

    @pytest.mark.parametrize("compile_it", [torch.jit.script, lambda m: torch.jit.trace(m, (X,))])
    def test_guarding_a_compiled_module(self, compile_it):
        """A module that runs without Python could be run behind the proxy unseen: refused."""
        with pytest.raises(TypeError, match=r"^Linear is TorchScript, .* Guard the module that it"):
            guard_module(compile_it(nn.Linear(3, 2)))


class TestGraphModules:
    @pytest.fixture
    def graph(self, critic):
        return torch.fx.symbolic_trace(critic)

    @pytest.fixture
    def expected(self, critic):
        return critic(X)

    def test_guarded(self, expected, graph):
        """A traced graph module has a class of its own, and is guarded all the same."""
        guard = guard_module(graph)
        with guard.context("inference"):
            assert torch.equal(guard.module(X), expected)
        assert is_refused(graph, X)
        guard.uninstall()
        assert torch.equal(graph(X), expected)

    @pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda p: pickle.loads(pickle.dumps(p))])
    def test_copied_and_pickled(self, expected, graph, duplicate):
        """Its copies are guarded."""
        copied = duplicate(guard_module(graph).module)
        with pytest.raises(NoContext):
            copied(X)
        with guard_of(copied).context("inference"):
            assert torch.equal(copied(X), expected)
        assert is_refused(copied.__wrapped__, X)

    @pytest.mark.parametrize("write", [lambda graph: graph.recompile(), pickle.dumps])
    def test_written_again_after_guarding(self, expected, graph, write):
        """After an edit of the graph, or a save, the module runs on, guarded."""
        guard = guard_module(graph)
        write(graph)
        with guard.context("inference"):
            assert torch.equal(guard.module(X), expected)
        assert is_refused(graph, X)
        guard.uninstall()
        assert torch.equal(graph(X), expected)

    def test_tracing_behind_the_proxy(self, guard, critic):
        """Symbolic tracing behind the proxy is a bypass."""
        with pytest.raises(BypassedGuard):
            torch.fx.symbolic_trace(critic)
