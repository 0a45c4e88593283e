"""The accelerate helper in real loops: what prepare makes of a module, and steps as it counts."""

import contextlib
import re
import subprocess
import sys

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lensnet_guard import (
    BudgetExceeded,
    BudgetUnmet,
    BypassedGuard,
    CallPolicy,
    UnsanctionedCall,
    guard_module,
    guard_of,
)
from lensnet_guard.integrations import GuardLost

pytest.importorskip("accelerate")

from accelerate import Accelerator
from accelerate.utils import ProjectConfiguration, TorchDynamoPlugin

from lensnet_guard.integrations.accelerate import GuardedAccelerator

pytestmark = pytest.mark.usefixtures("fresh_accelerate")

VALUE = CallPolicy(scopes={"value": 1})


class Critic(nn.Module):
    """Two blocks of one class, which regional compilation compiles one by one."""

    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList([nn.Linear(3, 3), nn.Linear(3, 3)])

    def forward(self, x):
        for block in self.blocks:
            x = block(x)
        return x


class Agent(nn.Module):
    """A model that holds the guarded critic."""

    def __init__(self):
        super().__init__()
        self.body, self.critic = nn.Linear(3, 3), Critic()

    def forward(self, x):
        return self.critic(self.body(x))


def loader():
    return DataLoader(TensorDataset(torch.ones(10, 3)), batch_size=2)  # five batches


def train(guarded, critic, optimizer, data, ask=None):
    """Two epochs; ``ask`` makes the calls of a batch, by default the one legal call."""
    for _ in range(2):
        for (x,) in data:
            with guarded.accumulate(critic):
                if ask is not None:
                    ask(x)
                    continue
                with guarded.guard.sanctioned("value"):
                    values = critic(x)
                guarded._accelerator.backward(values.mean())
                optimizer.step()
                optimizer.zero_grad()


@pytest.fixture
def make():
    """A guarded accelerator, and what its `prepare` made of a critic, an optimizer and data."""

    def make(guard_options=None, **options):
        accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2, **options)
        contract = {"policy": VALUE, "name": "critic"} | (guard_options or {})
        guarded = GuardedAccelerator(accelerator, **contract)
        critic = Critic()
        optimizer = torch.optim.SGD(critic.parameters(), lr=0.1)
        return guarded, *guarded.prepare(critic, optimizer, loader())

    return make


class TestPrepare:
    @pytest.mark.parametrize("precision", ["no", "bf16"])
    def test_the_guard_is_on_what_accelerate_makes(self, make, precision):
        """With mixed precision it patches ``forward``, which a guard put on before would refuse."""
        guarded, critic, optimizer, data = make(mixed_precision=precision)
        weight = critic.blocks[0].weight.detach().clone()
        assert guard_of(critic) is guarded.guard
        assert guarded.guard.module is critic
        with guarded:
            train(guarded, critic, optimizer, data)
            assert critic(torch.ones(1, 3)).dtype is torch.float32
        assert guarded.verdict.calls == {"value": 10}
        assert not weight.equal(critic.blocks[0].weight)

    def test_a_guard_put_on_before_keeps_mixed_precision(self):
        """Without the helper: accelerate replaces the forward of the guarded module."""
        accelerator = Accelerator(cpu=True, mixed_precision="bf16")
        critic, plain, x = Critic(), Critic(), torch.randn(4, 3)
        plain.load_state_dict(critic.state_dict())
        exact, expected = plain(x), accelerator.prepare(plain)(x)
        guard = guard_module(critic, policy=VALUE, name="critic")
        prepared = accelerator.prepare(guard.module)
        with guard.context("inference"):
            found = prepared(x)
        assert torch.equal(found, expected)
        assert not torch.equal(found, exact)
        with pytest.raises(BypassedGuard):
            critic(x)
        assert (guard.count(), guard.violation_count) == (1, 1)
        assert accelerator.unwrap_model(prepared, keep_fp32_wrapper=False) is guard.module
        with guard.context("inference"):
            assert torch.equal(guard.module(x), exact)

    # Torch's own, of the second block's input, which is no leaf
    @pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
    def test_regional_compilation_is_guarded(self, make):
        """It makes a copy whose blocks are compiled."""
        torch._dynamo.reset()
        plugin = TorchDynamoPlugin(backend="eager", use_regional_compilation=True)
        guarded, critic, optimizer, data = make(dynamo_plugin=plugin)
        assert all(hasattr(block, "_orig_mod") for block in critic.blocks)
        with guarded:
            train(guarded, critic, optimizer, data)
        torch._dynamo.reset()
        assert guarded.verdict.calls == {"value": 10}

    def test_one_object_comes_back_alone(self):
        """As from ``accelerator.prepare``."""
        guarded = GuardedAccelerator(Accelerator(cpu=True))
        critic = guarded.prepare(Critic())
        assert guard_of(critic) is guarded.guard
        assert guarded.guard.name == "Critic"

    def test_the_raw_module_is_refused(self, make):
        """What ``unwrap_model`` or an old reference calls is behind the guard's back."""
        guarded, critic, *_ = make()
        with pytest.raises(BypassedGuard), guarded, guarded.accumulate(critic):
            critic.__wrapped__(torch.ones(1, 3))

    def test_a_model_that_holds_the_guarded_module(self):
        """The guard was there before, and still is."""
        accelerator = Accelerator(cpu=True, mixed_precision="bf16")
        agent = Agent()
        guard = guard_module(agent.critic, policy=VALUE, name="critic")
        agent.critic = guard.module
        guarded = GuardedAccelerator(accelerator, guard)
        agent, data = guarded.prepare(agent, loader())
        with guarded:
            for (x,) in data:
                with guarded.accumulate(agent), guard.sanctioned("value"):
                    agent(x)
        assert guarded.verdict.calls == {"value": 5}

    def test_a_frozen_module_that_is_not_prepared(self):
        """Its guard only needs the steps."""
        guard = guard_module(Critic(), policy=VALUE, name="critic")
        guarded = GuardedAccelerator(Accelerator(cpu=True), guard)
        data = guarded.prepare(loader())
        with guarded:
            train(guarded, guard.module, torch.optim.SGD(guard.module.parameters(), lr=0.1), data)
        assert guarded.verdict.calls == {"value": 10}


class TestLostGuards:
    def test_regional_compilation_copies_a_model_without_the_guard(self):
        """Found by `prepare`: the copy has a raw critic, and the original only looks as before."""
        plugin = TorchDynamoPlugin(backend="eager", use_regional_compilation=True)
        accelerator = Accelerator(cpu=True, dynamo_plugin=plugin)
        agent = Agent()
        guard = guard_module(agent.critic, policy=VALUE, name="critic")
        agent.critic = guard.module
        with pytest.raises(GuardLost) as caught:
            GuardedAccelerator(accelerator, guard).prepare(agent)
        assert str(caught.value) == (
            "the guard of critic is lost: what accelerator.prepare made of the Agent does not hold "
            "the guarded module any more.\n"
            "  what to do   Guard it afterwards: give the raw module to "
            "GuardedAccelerator(accelerator, policy=...).prepare.\n"
            "  explained by lensnet-guard explain bypassed-wrapper"
        )

    def test_a_module_that_is_replaced_in_the_loop(self):
        """Found at the next micro-step."""
        agent = Agent()
        guard = guard_module(agent.critic, policy=VALUE, name="critic")
        agent.critic = guard.module
        guarded = GuardedAccelerator(Accelerator(cpu=True), guard)
        agent = guarded.prepare(agent)
        with pytest.raises(GuardLost, match=r"Agent\.critic is a Critic without a guard"):
            with guarded:
                agent.critic = Critic()
                with guarded.accumulate(agent):
                    pass


class TestBudget:
    def test_steps_are_numbered_as_accelerate_counts_them(self, make):
        """The last batch of an epoch ends an optimizer step, whatever its number."""
        guarded, critic, optimizer, data = make()
        with guarded:
            train(guarded, critic, optimizer, data)
        numbers = [(call.step, call.micro_step) for call in guarded.guard.calls]
        first = [(0, 0), (0, 1), (1, 0), (1, 1), (2, 0)]
        assert numbers == first + [(step + 3, micro_step) for step, micro_step in first]
        assert str(guarded.verdict) == (
            "critic: 10 micro-steps, 10 training calls (value 10), 0 inference calls, 0 violations"
        )

    @pytest.mark.parametrize("times", [0, 2])
    def test_too_few_and_too_many_calls_are_refused(self, make, times):
        """Where they are made, or at the end of the micro-step."""
        guarded, critic, optimizer, data = make()

        def ask(x):
            with guarded.guard.sanctioned("value"):
                for _ in range(times):
                    critic(x)

        with pytest.raises(BudgetExceeded if times else BudgetUnmet, match="critic"):
            with guarded:
                train(guarded, critic, optimizer, data, ask)

    def test_a_call_outside_the_scope_is_refused(self, make):
        """In the micro-step; between two of them it is free."""
        guarded, critic, optimizer, data = make()
        with pytest.raises(UnsanctionedCall):
            with guarded:
                critic(torch.ones(1, 3))
                train(guarded, critic, optimizer, data)
                critic(torch.ones(1, 3))
                train(guarded, critic, optimizer, data, critic)
        assert guarded.verdict.inference_calls == 2

    def test_after_an_exception_nothing_is_open(self, make):
        """And the loop can be run again."""
        guarded, critic, optimizer, data = make()
        with pytest.raises(ZeroDivisionError):
            with guarded:
                train(guarded, critic, optimizer, data, lambda _: 1 / 0)
        assert guarded.guard.current_context is None
        with guarded:
            train(guarded, critic, optimizer, data)
        assert (guarded.verdict.micro_steps, guarded.verdict.violations) == (10, 0)

    def test_a_batch_that_is_skipped_by_an_exception(self, make):
        """The loop catches it and goes on; the micro-step is over, and owes nothing."""
        guarded, critic, optimizer, data = make()
        with guarded:
            with pytest.raises(ZeroDivisionError), guarded.accumulate(critic):
                raise ZeroDivisionError
            critic(torch.ones(1, 3))
            train(guarded, critic, optimizer, data)
        verdict = guarded.verdict
        assert (verdict.micro_steps, verdict.inference_calls, verdict.violations) == (10, 1, 0)

    def test_an_exception_tells_of_a_violation_that_was_swallowed_before(self, make):
        """It may well be what came of it."""
        guarded, critic, *_ = make()
        with pytest.raises(ZeroDivisionError) as caught, guarded, guarded.accumulate(critic):
            with contextlib.suppress(UnsanctionedCall):
                critic(torch.ones(1, 3))
            raise ZeroDivisionError
        (note,) = caught.value.__notes__
        assert note.startswith("Before this, a LensNetViolation was swallowed: critic was called")

    def test_without_a_log_the_calls_are_written_to_the_project_folder(self, make, tmp_path):
        """And the exception says so."""
        folder = ProjectConfiguration(project_dir=str(tmp_path))
        guarded, critic, optimizer, data = make(project_config=folder)
        with pytest.raises(UnsanctionedCall) as caught, guarded:
            train(guarded, critic, optimizer, data, critic)
        path = tmp_path / "lensnet.rank0.jsonl"
        assert '"reason":"UnsanctionedCall"' in path.read_text()
        note = f"lensnet_guard: the calls of critic are in {path}"
        assert caught.value.__notes__ == [note]

    def test_with_a_log_that_is_named(self, make, tmp_path):
        """No second file is written."""
        guarded, critic, optimizer, data = make({"log": tmp_path / "log"})
        with pytest.raises(ZeroDivisionError) as caught, guarded:
            train(guarded, critic, optimizer, data, lambda _: 1 / 0)
        guarded.guard.end_log()
        path = tmp_path / "log" / "lensnet.rank0.jsonl"
        note = f"lensnet_guard: the calls of critic are in {path}"
        assert caught.value.__notes__ == [note]

    def test_the_log_moved_with_the_process(self, tmp_path, monkeypatch):
        """A relative folder is the one where the loop was set up."""
        monkeypatch.chdir(tmp_path)
        guarded = GuardedAccelerator(Accelerator(cpu=True), log="log")
        (tmp_path / "other").mkdir()
        monkeypatch.chdir("other")
        guarded.prepare(Critic())
        assert guarded.guard.log_path == tmp_path / "log" / "lensnet.rank0.jsonl"


class TestMisuse:
    def test_no_module_to_guard(self):
        """The first object is it."""
        guarded = GuardedAccelerator(Accelerator(cpu=True))
        for objects, kind in (((), "NoneType"), ((loader(), Critic()), "DataLoader")):
            with pytest.raises(TypeError, match=f"must be the module to guard, not {kind}"):
                guarded.prepare(*objects)

    def test_a_module_that_is_guarded_already(self):
        """Accelerate must wrap the raw one."""
        guard = guard_module(Critic(), name="critic")
        with pytest.raises(ValueError, match="critic is guarded already, and accelerate must wrap"):
            GuardedAccelerator(Accelerator(cpu=True)).prepare(guard.module)

    def test_a_block_without_a_guard(self):
        """`prepare` was forgotten."""
        with pytest.raises(RuntimeError, match="there is no guard yet"):
            with GuardedAccelerator(Accelerator(cpu=True)):
                pass

    def test_a_micro_step_outside_the_block(self, make):
        """Nothing would be told when it raises."""
        guarded, critic, *_ = make()
        with pytest.raises(RuntimeError, match="with guarded:"):
            with guarded.accumulate(critic):
                pass

    def test_a_policy_for_a_guard_that_has_one(self):
        """It would be ignored."""
        guard = guard_module(Critic(), name="critic")
        with pytest.raises(ValueError, match="critic has a guard already, which policy cannot"):
            GuardedAccelerator(Accelerator(cpu=True), guard, policy=VALUE)


class TestProcesses:
    def test_two_processes_keep_the_budget_each_and_train_together(self, tmp_path):
        """As ``torchrun`` starts them: accelerate wraps the critic in DDP, and the guard that."""
        script = tmp_path / "script.py"
        script.write_text(
            "import torch\n"
            "from accelerate import Accelerator\n"
            "from torch import nn\n"
            "from torch.utils.data import DataLoader, TensorDataset\n"
            "from lensnet_guard import CallPolicy\n"
            "from lensnet_guard.integrations.accelerate import GuardedAccelerator\n"
            "accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)\n"
            "policy = CallPolicy(scopes={'value': 1})\n"
            "guarded = GuardedAccelerator(accelerator, policy=policy, name='critic', log='log')\n"
            "torch.manual_seed(accelerator.process_index)\n"
            "critic, data = nn.Linear(3, 1), TensorDataset(torch.randn(8, 3))\n"
            "optimizer = torch.optim.SGD(critic.parameters(), lr=0.1)\n"
            "critic, optimizer, data = guarded.prepare(\n"
            "    critic, optimizer, DataLoader(data, batch_size=2)\n"
            ")\n"
            "assert isinstance(critic, nn.parallel.DistributedDataParallel)\n"
            "with guarded:\n"
            "    for (x,) in data:\n"
            "        with guarded.accumulate(critic):\n"
            "            with guarded.guard.sanctioned('value'):\n"
            "                values = critic(x)\n"
            "            accelerator.backward(values.square().mean())\n"
            "            optimizer.step()\n"
            "            optimizer.zero_grad()\n"
            "assert accelerator.gather(critic.module.weight.detach()).unique(dim=0).shape[0] == 1\n"
            "print(f'{accelerator.process_index}: {guarded.verdict}\\n', end='', flush=True)\n"
            "accelerator.end_training()\n"
        )
        run = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", str(script)]
        done = subprocess.run(
            [sys.executable, *run], cwd=tmp_path, capture_output=True, text=True, timeout=120
        )
        assert done.returncode == 0, done.stderr
        sums = "critic: 2 micro-steps, 2 training calls (value 2), 0 inference calls, 0 violations"
        # In between, torch 2.9's gloo says something, with both ranks at once.
        told = re.findall(r"\d: \w+: .* violations", done.stdout)
        assert sorted(told) == [f"0: {sums}", f"1: {sums}"]
        logs = sorted(path.name for path in (tmp_path / "log").iterdir())
        assert logs == ["lensnet.rank0.jsonl", "lensnet.rank1.jsonl"]
