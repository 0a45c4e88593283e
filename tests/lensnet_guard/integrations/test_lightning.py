"""The Lightning callback in real trainings: budgets, free validation, and every way out."""

import contextlib
import logging
import re

import pytest
import torch
import torch.nn.functional as F
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

pytest.importorskip("lightning")

from lightning.fabric import Fabric
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.strategies import SingleDeviceStrategy

from lensnet_guard.integrations import GuardLost, sanctioned
from lensnet_guard.integrations.lightning import LensNetGuardCallback

pytestmark = [
    pytest.mark.filterwarnings(f"ignore:{text}")
    for text in (
        ".*isinstance.treespec, LeafSpec.*:FutureWarning",  # Lightning's own, of torch's pytree
        ".*does not have many workers",  # a hint
        "Found .* module.s. in eval mode",  # as a frozen reference is
        ".*litlogger",
    )
]

KL = CallPolicy(scopes={"kl": 1})


class Distiller(LightningModule):
    """Learns to do as a frozen reference does; ``extra`` is called in the hook of that name."""

    def __init__(self, **extra):
        super().__init__()
        self.net = nn.Linear(3, 2)
        self.reference = nn.Linear(3, 2).requires_grad_(False)
        self.extra = extra

    def run_extra(self, hook):
        return self.extra[hook](self) if hook in self.extra else None

    def ask(self, x):
        with sanctioned(self.reference, "kl"):
            return self.reference(x)

    def training_step(self, batch, _):
        x = batch[0]
        target = torch.zeros(2) if "skip" in self.extra else self.ask(x)
        self.run_extra("training_step")
        return F.mse_loss(self.net(x), target.expand(len(x), 2))

    def validation_step(self, batch, _):
        self.log("loss", F.mse_loss(self.net(batch[0]), self.reference(batch[0])))

    test_step = validation_step

    def predict_step(self, batch, _):
        return self.reference(batch[0])

    def on_train_batch_start(self, *_):
        return self.run_extra("on_train_batch_start")

    def on_train_epoch_start(self):
        self.run_extra("on_train_epoch_start")

    def on_train_epoch_end(self):
        self.run_extra("on_train_epoch_end")

    def on_train_end(self):
        self.run_extra("on_train_end")

    def configure_optimizers(self):
        return torch.optim.SGD(self.net.parameters(), lr=0.1)


def ask_once_more(model):
    model.reference(torch.ones(1, 3))


@pytest.fixture
def loader():
    return DataLoader(TensorDataset(torch.ones(8, 3)), batch_size=2)  # four batches


@pytest.fixture
def fit(tmp_path, loader):
    """Fit a model under a callback, quietly, with a sanity check and validation in mid-epoch."""

    def fit(model, callback, **options):
        logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
        options = {"callbacks": [callback], "max_epochs": 1, "val_check_interval": 2} | options
        trainer = Trainer(
            accelerator="cpu",
            devices=1,
            default_root_dir=tmp_path,
            num_sanity_val_steps=1,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            **options,
        )
        trainer.fit(model, loader, loader)
        return trainer

    return fit


@pytest.fixture
def callback():
    return LensNetGuardCallback("reference", policy=KL)


class TestBudget:
    def test_one_call_per_batch_is_kept_and_told(self, fit, callback):
        """The verdict has the sums of this training: sanity check 1, validation twice 4."""
        fit(Distiller(), callback)
        verdict = callback.verdict
        assert str(verdict) == (
            "reference: 4 micro-steps, 4 training calls (kl 4), 9 inference calls, 0 violations"
        )
        assert (verdict.micro_steps, verdict.calls, verdict.calls_per_micro_step) == (
            4,
            {"kl": 4},
            1.0,
        )

    def test_the_verdict_is_logged_once(self, fit, callback, monkeypatch):
        """At the end, in Lightning's own log."""
        lines = []
        monkeypatch.setattr("lensnet_guard.integrations.lightning.rank_zero_info", lines.append)
        fit(Distiller(), callback)
        assert lines == [f"lensnet_guard: {callback.verdict}"]

    def test_steps_are_numbered_as_the_trainer_counts_them(self, fit, callback):
        """Optimizer steps go on over epochs; micro-steps count the batches inside one."""
        fit(Distiller(), callback, max_epochs=2, accumulate_grad_batches=3)
        numbers = [(c.step, c.micro_step) for c in callback.guard.calls if c.scope == "kl"]
        first, second = [(0, 0), (0, 1), (0, 2), (1, 0)], [(2, 0), (2, 1), (2, 2), (3, 0)]
        assert numbers == first + second

    def test_a_second_call_in_the_scope_is_refused(self, fit, callback):
        """`fit` raises it, before the module runs."""
        model = Distiller(training_step=lambda m: m.ask(torch.ones(1, 3)))
        with pytest.raises(BudgetExceeded, match="reference was called in training more often"):
            fit(model, callback)

    def test_a_call_outside_the_scope_is_refused_although_it_is_swallowed(self, fit, callback):
        """The end of the batch raises what a helper has hidden."""

        def hide(model):
            with contextlib.suppress(Exception):
                ask_once_more(model)

        with pytest.raises(UnsanctionedCall, match="in ask_once_more"):
            fit(Distiller(training_step=hide), callback)

    def test_a_step_without_the_call_is_refused(self, fit, callback):
        """The end of the batch says so."""
        with pytest.raises(BudgetUnmet, match="reference was met: kl made 0 of 1 calls"):
            fit(Distiller(skip=True), callback)

    def test_a_sanctioned_caller_needs_no_change_of_the_module(self, fit):
        """The policy names ``training_step``; a micro-step is open around it."""

        class Plain(Distiller):
            def ask(self, x):
                return self.reference(x)

        caller = f"{__name__}:Distiller.training_step"
        callback = LensNetGuardCallback(
            "reference", policy=CallPolicy(sanctioned_callers={caller: 1})
        )
        fit(Plain(), callback)
        assert callback.verdict.calls == {caller: 4}

    def test_an_epoch_that_is_cut_short_owes_nothing(self, fit, callback):
        """``on_train_batch_start`` gives back -1, and no end of the batch is told."""
        fit(Distiller(on_train_batch_start=lambda _: -1), callback)
        assert (callback.verdict.micro_steps, callback.verdict.violations) == (0, 0)

    @pytest.mark.parametrize("hook", ["on_train_epoch_start", "on_train_epoch_end"])
    @pytest.mark.parametrize("validated", [True, False])
    def test_between_batches_no_call_is_legal(self, fit, callback, hook, validated):
        """Whether or not the sanity check or validation has just run."""
        model = Distiller(**{hook: ask_once_more})
        with pytest.raises(UnsanctionedCall):
            fit(model, callback, limit_val_batches=1.0 if validated else 0)

    def test_after_training_calls_are_free(self, fit, callback):
        """The last hook of the module may ask what it likes."""
        fit(Distiller(on_train_end=ask_once_more), callback)
        assert callback.verdict.inference_calls == 10

    def test_mixed_precision(self, fit, callback):
        """Lightning runs the step under autocast."""
        fit(Distiller(), callback, precision="bf16-mixed")
        assert callback.verdict.calls == {"kl": 4}

    def test_a_compiled_lightning_module_is_guarded(self, fit, callback):
        """Lightning compiles the step; the call is counted all the same."""
        torch._dynamo.reset()
        fit(torch.compile(Distiller(), backend="eager"), callback)
        torch._dynamo.reset()
        assert callback.verdict.calls == {"kl": 4}


class TestOutsideFit:
    @pytest.mark.parametrize("stage", ["validate", "test", "predict"])
    def test_calls_are_free(self, fit, loader, stage):
        """With a guard that exists and stays on."""
        model = Distiller()
        guard = guard_module(model.reference, policy=KL, name="reference")
        model.reference = guard.module
        trainer = fit(model, LensNetGuardCallback(guard))
        before = guard.count("inference")
        verbose = {} if stage == "predict" else {"verbose": False}
        getattr(trainer, stage)(model, loader, **verbose)
        assert guard.count("inference") - before == 4
        assert guard.current_context is None

    def test_validation_alone_is_guarded_for_as_long_as_it_runs(self, fit, callback, loader):
        """By the attribute's name."""
        model = Distiller()
        raw = model.reference
        trainer = fit(model, callback)
        guard = callback.guard
        trainer.validate(model, loader, verbose=False)
        assert callback.guard is not guard
        assert callback.guard.count("inference") == 4
        assert model.reference is raw


class TestTheModuleIsGivenBack:
    def test_after_a_fit(self, fit, callback):
        """The very same object, with its own class."""
        model = Distiller()
        raw = model.reference
        fit(model, callback)
        assert model.reference is raw
        assert type(raw) is nn.Linear
        assert guard_of(raw) is None
        assert callback.guard.current_context is None

    def test_after_an_exception_which_leaves_the_callback_usable(self, fit, callback):
        """Nothing of the failed run is open any more."""

        def fail(_):
            raise RuntimeError("out of luck")

        model = Distiller(training_step=fail)
        raw = model.reference
        with pytest.raises(RuntimeError, match="out of luck"):
            fit(model, callback)
        assert model.reference is raw
        assert type(raw) is nn.Linear
        assert callback.guard.current_context is None
        assert callback.verdict is None
        model.extra = {}
        fit(model, callback)
        assert callback.verdict.calls == {"kl": 4}
        model.extra = {"training_step": fail}
        with pytest.raises(RuntimeError, match="out of luck"):
            fit(model, callback)
        assert callback.verdict is None

    def test_after_an_exception_that_it_is_not_told_of(self, fit, callback):
        """An earlier callback fails at it; the next fit closes what is open."""

        class Fails(Callback):
            def on_exception(self, *_):
                raise OSError("disk full")

        model = Distiller(training_step=lambda _: 1 / 0)
        raw = model.reference
        with pytest.raises(OSError, match="disk full"):
            fit(model, callback, callbacks=[Fails(), callback])
        assert model.reference is not raw
        model.extra = {}
        fit(model, callback)
        assert model.reference is raw
        assert callback.verdict.calls == {"kl": 4}

    def test_two_fits_in_a_row_count_each_for_itself(self, fit, callback):
        """A guard that exists goes on counting; the verdict is of one fit."""
        fit(Distiller(), callback)
        fit(Distiller(), callback)
        assert callback.verdict.micro_steps == 4
        model = Distiller()
        guard = guard_module(model.reference, policy=KL)
        model.reference = guard.module
        again = LensNetGuardCallback(guard)
        fit(model, again)
        fit(model, again)
        assert again.verdict.calls == {"kl": 4}
        assert guard.count("training", "kl") == 8

    def test_a_module_that_was_guarded_before_keeps_its_guard(self, fit, callback):
        """Found by the attribute's name."""
        model = Distiller()
        guard = guard_module(model.reference, policy=KL)
        model.reference = guard.module
        fit(model, callback)
        assert callback.guard is guard
        assert model.reference is guard.module

    def test_a_part_of_a_part(self, fit):
        """A dotted path leads to it."""

        class Nested(Distiller):
            def __init__(self):
                super().__init__()
                self.nets = nn.ModuleDict({"frozen": self.reference})
                del self.reference

            @property
            def reference(self):
                return self.nets["frozen"]

        callback = LensNetGuardCallback("nets.frozen", policy=KL)
        fit(Nested(), callback)
        assert callback.verdict.module == "frozen"


class TestEvidence:
    def test_without_a_log_the_calls_are_written_down_on_an_exception(
        self, fit, callback, tmp_path
    ):
        """In a file that ``lensnet-guard postmortem`` reads, named on the exception."""
        from lensnet_guard.postmortem.verdict import read_verdict

        with pytest.raises(BudgetExceeded) as caught:
            fit(Distiller(training_step=lambda m: m.ask(torch.ones(1, 3))), callback)
        verdict = read_verdict(tmp_path)
        assert (verdict.micro_steps, verdict.calls, verdict.inference_calls) == (1, 1, 1)
        assert verdict.violations == 1
        path = tmp_path / "lensnet.rank0.jsonl"
        note = f"lensnet_guard: the calls of reference are in {path}"
        assert caught.value.__notes__ == [note]

    def test_with_a_log_that_is_named_once(self, fit, tmp_path):
        """On an exception that has nothing to do with the guard, too."""

        def fail(_):
            raise RuntimeError("out of luck")

        callback = LensNetGuardCallback("reference", policy=KL, log=tmp_path / "log")
        with pytest.raises(RuntimeError) as caught:
            fit(Distiller(training_step=fail), callback)
        path = tmp_path / "log" / "lensnet.rank0.jsonl"
        assert '"run.end"' in path.read_text()
        assert not (tmp_path / "lensnet.rank0.jsonl").exists()
        note = f"lensnet_guard: the calls of reference are in {path}"
        assert caught.value.__notes__ == [note]


class TestModes:
    def test_observe_only_tells(self, fit):
        """The verdict counts them, and the end of the run warns."""
        callback = LensNetGuardCallback("reference", policy=KL, mode="observe")
        with pytest.warns(RuntimeWarning, match="4 violations of reference's contract"):
            fit(Distiller(training_step=ask_once_more), callback)
        assert callback.verdict.violations == 4

    def test_off_installs_nothing(self, fit):
        """Nor does it count."""
        callback = LensNetGuardCallback("reference", policy=KL, mode="off")
        model = Distiller(training_step=ask_once_more)
        raw = model.reference
        fit(model, callback)
        assert callback.guard.module is raw
        assert callback.verdict.calls == {"kl": 0}

    def test_off_leaves_no_evidence(self, fit, tmp_path):
        """There is none."""
        callback = LensNetGuardCallback("reference", policy=KL, mode="off")
        with pytest.raises(ZeroDivisionError):
            fit(Distiller(training_step=lambda _: 1 / 0), callback)
        assert list(tmp_path.iterdir()) == []


class Unwrapping(SingleDeviceStrategy):
    """Puts raw modules in the place of proxies, as a strategy does that rebuilds the model."""

    def setup(self, trainer):
        super().setup(trainer)
        model = self.lightning_module
        model.reference = model.reference.__wrapped__


class TestFabric:
    """A module that Fabric had set up was destroyed by a guard, and not repaired by its end."""

    @pytest.fixture
    def fabric(self):
        return Fabric(accelerator="cpu", devices=1)

    @pytest.mark.parametrize("mode", ["enforce", "observe"])
    def test_a_module_that_was_set_up_is_guarded_and_given_back(self, fabric, mode):
        """It trains as without a guard; behind its guard's back neither it nor the user's runs."""
        raw = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 1))
        module = fabric.setup(raw)
        x, before = torch.ones(2, 3), [type(part) for part in module.modules()]
        control = module(x)
        guard = guard_module(module, policy=KL, mode=mode)
        with guard.context("training"), guard.micro_step(0), guard.sanctioned("kl"):
            output = guard.module(x)
        assert torch.equal(output, control)
        fabric.backward(output.sum())
        assert raw[0].weight.grad is not None
        for behind in (module, raw, raw[0]):
            with pytest.raises(BypassedGuard) if mode == "enforce" else contextlib.nullcontext():
                behind(x)
        assert (guard.count(), guard.violation_count) == (1, 3)
        guard.uninstall()
        assert [type(part) for part in module.modules()] == before
        assert type(raw) is nn.Sequential
        assert torch.equal(module(x), control)

    def test_a_guarded_module_can_be_set_up(self, fabric):
        """The other way round."""
        guard = guard_module(nn.Linear(3, 1), policy=KL)
        module = fabric.setup(guard.module)
        with guard.context("training"), guard.micro_step(0), guard.sanctioned("kl"):
            fabric.backward(module(torch.ones(2, 3)).sum())
        assert guard.count() == 1

    def test_several_modules_of_a_list(self, fabric):
        """The list itself has no call to count; its modules have."""
        critics = nn.ModuleList(fabric.setup(nn.Linear(3, 1)) for _ in range(2))
        with pytest.raises(TypeError, match="a ModuleList has no forward"):
            guard_module(critics)
        guards = [guard_module(critic, policy=KL) for critic in critics]
        for guard in guards:
            with guard.context("inference"):
                assert guard.module(torch.ones(2, 3)).shape == (2, 1)
            guard.uninstall()
        assert [type(critic).__name__ for critic in critics] == ["_FabricModule"] * 2


class TestLostGuards:
    @pytest.mark.parametrize("by_name", [True, False])
    def test_a_strategy_that_unwraps_the_proxy(self, fit, by_name):
        """Found at the start of `fit`, before the sanity check."""
        model = Distiller()
        guard = guard_module(model.reference, policy=KL, name="critic")
        model.reference = guard.module
        callback = LensNetGuardCallback("reference" if by_name else guard)
        with pytest.raises(GuardLost) as caught:
            fit(model, callback, strategy=Unwrapping(device="cpu"))
        assert str(caught.value) == (
            "the guard of critic is lost: Distiller.reference is the raw Linear that was behind "
            "it.\n"
            "  what to do   Something replaced it after it was guarded: a strategy that unwraps or "
            "rebuilds modules, configure_model, a copy. Give the integration the attribute's name "
            "instead of a guard, so that it guards what is there when the training starts; during "
            "the training load weights into the module (copy_, load_state_dict) instead of "
            "replacing it.\n"
            "  explained by lensnet-guard explain bypassed-wrapper"
        )
        assert guard.count() == 0

    @pytest.mark.parametrize(
        ("replacement", "words"),
        [
            (lambda _: nn.Linear(3, 2), "a Linear without a guard"),
            (lambda _: None, "gone"),
            (
                lambda old: guard_module(nn.Linear(3, 2), name="impostor").module,
                "a Linear with another guard, impostor",
            ),
        ],
    )
    def test_a_module_that_is_replaced_in_training(self, fit, callback, replacement, words):
        """Found at the next batch; what is there is left in place, with a warning."""

        def replace(model):
            model.reference = replacement(model.reference)

        with pytest.warns(RuntimeWarning, match=r"Distiller\.reference was replaced inside"):
            with pytest.raises(GuardLost, match=f"Distiller.reference is {words}"):
                fit(Distiller(training_step=replace), callback)

    def test_a_guard_whose_module_is_nowhere(self, fit):
        """It was made and never put in place."""
        guard = guard_module(nn.Linear(3, 2), policy=KL, name="critic")
        with pytest.raises(GuardLost, match="its module is nowhere in Distiller"):
            fit(Distiller(), LensNetGuardCallback(guard))

    def test_a_module_that_is_made_late_is_guarded(self, fit, callback):
        """In ``configure_model``, where sharded models are built."""

        class Late(Distiller):
            def __init__(self):
                super().__init__()
                self.reference = None

            def configure_model(self):
                self.reference = nn.Linear(3, 2)

        fit(Late(), callback)
        assert callback.verdict.calls == {"kl": 4}

    def test_a_module_that_is_never_made(self, fit, callback):
        """There is nothing to guard."""
        model = Distiller()
        model.reference = None
        with pytest.raises(TypeError, match=r"Distiller\.reference is None, so there is nothing"):
            fit(model, callback)


class TestArguments:
    def test_neither_a_name_nor_a_guard(self):
        """Such as the module itself."""
        with pytest.raises(TypeError, match="must be the name of the attribute that holds"):
            LensNetGuardCallback(nn.Linear(3, 2))

    def test_a_policy_for_a_guard_that_has_one(self):
        """It would be ignored."""
        guard = guard_module(nn.Linear(3, 2), name="critic")
        with pytest.raises(ValueError, match="critic has a guard already, which policy and mode"):
            LensNetGuardCallback(guard, policy=KL, mode="observe")


class TestProcesses:
    def test_two_processes_of_ddp_keep_the_budget_each(self, run_python):
        """Each has a guard, contexts and a verdict of its own."""
        done = run_python(
            """
            import torch
            import torch.nn.functional as F
            from torch import nn
            from torch.utils.data import DataLoader, TensorDataset
            from lightning.pytorch import LightningModule, Trainer
            from lensnet_guard import CallPolicy
            from lensnet_guard.integrations import sanctioned
            from lensnet_guard.integrations.lightning import LensNetGuardCallback

            class Distiller(LightningModule):
                def __init__(self):
                    super().__init__()
                    self.net, self.reference = nn.Linear(3, 2), nn.Linear(3, 2)
                    self.reference.requires_grad_(False)

                def training_step(self, batch, _):
                    with sanctioned(self.reference, "kl"):
                        return F.mse_loss(self.net(batch[0]), self.reference(batch[0]))

                def configure_optimizers(self):
                    return torch.optim.SGD(self.net.parameters(), lr=0.1)

                def on_fit_end(self):
                    print(f"rank {self.global_rank}: {callback.verdict}\\n", end="", flush=True)

            callback = LensNetGuardCallback("reference", policy=CallPolicy(scopes={"kl": 1}))
            trainer = Trainer(
                accelerator="cpu", devices=2, strategy="ddp_fork", max_epochs=1,
                callbacks=[callback], logger=False, enable_checkpointing=False,
                enable_progress_bar=False, enable_model_summary=False,
            )
            data = DataLoader(TensorDataset(torch.ones(8, 3)), batch_size=2)
            trainer.fit(Distiller(), data)
            """
        )
        assert done.returncode == 0, done.stderr
        sums = "reference: 2 micro-steps, 2 training calls (kl 2), 0 inference calls, 0 violations"
        # In between, torch 2.9's gloo says something, with both ranks at once.
        told = re.findall(r"rank \d: \w+: .* violations", done.stdout)
        assert sorted(told) == [f"rank 0: {sums}", f"rank 1: {sums}"]
