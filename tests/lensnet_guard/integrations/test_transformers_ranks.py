"""The transformers Trainer on two processes: a guarded teacher and a guarded model behind DDP."""

import re

import pytest
from tests.lensnet_guard.helpers import read
from tests.lensnet_guard.integrations.two_ranks import run_scenarios

from lensnet_guard.postmortem import read_verdict

pytest.importorskip("transformers")

SCRIPT = """
import torch
import torch.nn.functional as F
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

from lensnet_guard import CallPolicy, guard_module
from lensnet_guard.integrations import sanctioned
from lensnet_guard.integrations.transformers import LensNetGuardCallback, guarded_trainer

def tiny_model(seed):
    torch.manual_seed(seed)
    sizes = {"hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=16, max_position_embeddings=8, **sizes, **heads))

class Distiller(Trainer):
    def compute_loss(self, model, inputs, return_outputs=False, **_):
        with sanctioned(model, "lm"):
            outputs = model(**inputs)
        target = self.ask(inputs)
        if self.args.process_index == 1 and self.state.global_step == 1:
            if self.scenario in ("extra", "callback"):
                self.ask(inputs)
            if self.scenario == "callback-failing":
                raise ValueError("out of luck")
        loss = F.mse_loss(outputs.logits, target)
        return (loss, outputs) if return_outputs else loss

    def ask(self, inputs):
        with torch.no_grad(), sanctioned(self.teacher, "kl"):
            return self.teacher(input_ids=inputs["input_ids"]).logits

def train(scenario, rank):
    torch.set_num_threads(1)
    tokens = torch.randint(0, 16, (16, 4), generator=torch.Generator().manual_seed(0))
    samples = [{"input_ids": row, "labels": row} for row in tokens]
    arguments = TrainingArguments(
        scenario, max_steps=3, per_device_train_batch_size=2, eval_strategy="steps", eval_steps=2,
        logging_steps=1, save_strategy="no", report_to=[], use_cpu=True, disable_tqdm=True,
        ddp_backend="gloo",
    )
    trainer = Distiller(tiny_model(0), arguments, train_dataset=samples, eval_dataset=samples[:4])
    trainer.scenario, trainer.teacher = scenario, tiny_model(1).requires_grad_(False)
    kl = CallPolicy({"kl": (1, 2) if scenario == "callback" else 1})
    if scenario == "plain":
        trainer.train()
    elif scenario.startswith("callback"):
        guard = guard_module(trainer.teacher, policy=kl, name="teacher")
        trainer.teacher = guard.module
        trainer.add_callback(LensNetGuardCallback(guard, compare_ranks=True))
        trainer.train()
    else:
        policies = {"teacher": kl, "model": CallPolicy({"lm": 1})}
        log = f"{scenario}/log"
        with guarded_trainer(trainer, policies, log=log, compare_ranks=True) as guarded:
            trainer.train()
        print(guarded.verdict)
        model = trainer.model_wrapped.module  # DDP's
        assert model is trainer.model and type(model) is LlamaForCausalLM
    losses = [line.get("loss", line.get("eval_loss")) for line in trainer.state.log_history]
    print("losses", [loss for loss in losses if loss is not None])
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("ranks")


@pytest.fixture(scope="module")
def ended(folder):
    scenarios = ["plain", "alike", "extra", "callback", "callback-failing"]
    return run_scenarios(folder, SCRIPT, scenarios)


class TestAlike:
    def test_both_ranks_train_as_without_a_guard(self, ended):
        """The same losses to the last bit, behind DDP, which holds the raw model again."""
        for plain, guarded in zip(ended["plain"], ended["alike"], strict=True):
            assert (plain.code, guarded.code) == (0, 0), guarded.err
            found = [re.findall("^losses.*", rank.out, re.MULTILINE) for rank in (plain, guarded)]
            assert found[0] == found[1]
            assert len(found[0]) == 1

    def test_the_verdict_is_printed_by_rank_0(self, ended):
        """Each rank has its own, in its callback."""
        sums = "{0}: 3 micro-steps, 3 training calls ({1} 3), 2 inference calls, 0 violations\n"
        lines = sums.format("teacher", "kl"), sums.format("model", "lm")
        first, second = ended["alike"]
        for rank in (first, second):
            assert "".join(lines) in rank.out
        assert "".join(f"lensnet_guard: {line}" for line in lines) in first.out
        assert "lensnet_guard:" not in second.out

    def test_each_rank_has_a_log_of_its_own(self, ended, folder):
        """Named by its number, and its first line tells of both modules."""
        for number in range(2):
            header = read(folder / "alike" / "log" / f"lensnet.rank{number}.jsonl")[0]
            assert (header["rank"], header["module"]) == (str(number), "teacher, model")
            assert header["policies"].keys() == {"teacher", "model"}
        verdict = read_verdict(folder / "alike" / "log")
        assert (verdict.calls, verdict.violations) == (12, 0)


class TestOneRankAlone:
    def test_a_call_too_many_on_rank_1_ends_both(self, ended):
        """Rank 0 says which line it was."""
        first, second = ended["extra"]
        assert (first.code, second.code) == (1, 1)
        assert "BudgetExceeded: teacher was called in training more often" in second.err
        assert "RankStopped: rank 1 stopped: BudgetExceeded: teacher was called" in first.err
        for rank in (first, second):
            assert re.search(r"called from +\S*ranks\.py:\d+ in Distiller\.ask", rank.err)

    def test_unequal_calls_that_the_budget_allows(self, ended):
        """Both ranks say what each has done, before the backward."""
        for rank in ended["callback"]:
            assert rank.code == 1
            assert "RankDivergence" in rank.err
            assert re.search(r"rank 0 +2 training calls in 2 micro-steps", rank.err)
            assert re.search(r"rank 1 +3 training calls in [12] micro-steps", rank.err)

    def test_an_exception_that_the_trainer_does_not_tell(self, ended):
        """The callback alone says so as the process ends."""
        first, second = ended["callback-failing"]
        assert (first.code, second.code) == (1, 1)
        assert "ValueError: out of luck" in second.err
        assert "RankStopped: rank 1 stopped: ValueError: out of luck" in first.err
