"""What `suggest` prints runs, holds of the run that it was made from, and is strict."""

import contextlib
import re

import pytest
import torch
from click.testing import CliRunner
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tests.lensnet_guard.postmortem import programs
from torch import nn

from lensnet_guard import (
    BudgetExceeded,
    BudgetUnmet,
    CallPolicy,
    ConditionUnmet,
    Scope,
    UnsanctionedCall,
    guard_module,
)
from lensnet_guard.cli import main


def observe(folder, program, module=None, policy=None, **keywords):
    """Run a program under a guard that observes and logs."""
    guard = guard_module(
        module or programs.reference(), mode="observe", log=folder, policy=policy, name="reference"
    )
    program(guard, **keywords)
    guard.end_log()


def suggested(folder, exit_code=0):
    """What the command prints."""
    result = CliRunner().invoke(main, ["suggest", str(folder)])
    assert (result.exit_code, result.stderr) == (exit_code, ""), result.output
    return result.stdout


def made_of(code):
    """The policy that printed code makes."""
    namespace = {}
    exec(compile(code, "policy.py", "exec"), namespace)
    return namespace["policy"]


def enforce(policy, program, module=None, **keywords):
    """Run a program under a policy; what it breaks is raised."""
    guard = guard_module(module or programs.reference(), mode="enforce", policy=policy)
    try:
        program(guard, **keywords)
    finally:
        guard.uninstall()
    assert guard.violation_count == 0
    return guard


GENERATION = CallPolicy({"any": Scope((0, None), per="generation")})
SCORE = f"{programs.__name__}:Training.score"
STRICT = {"requires": ("no_grad", "eval_mode", "frozen"), "ensures": ("detached",)}


class TestWhatWasKept:
    @pytest.mark.parametrize(
        ("program", "observed_by", "scopes"),
        [
            ("dpo", None, {"score": {"calls": 1, "caller": SCORE}}),
            (
                "kto",
                None,
                {
                    "score": {"calls": 1, "caller": SCORE},
                    "kl": {"calls": 1, "caller": f"{programs.__name__}:KTO.kl"},
                },
            ),
            ("kto_of_one_function", None, {"score": {"calls": 2, "caller": SCORE}}),
            ("unwatched", None, {"score": {"calls": 1, "per": "step", "caller": SCORE}}),
            ("opened", CallPolicy({"kl": (0, None)}), {"kl": [1, 2]}),
            (
                "grpo",
                GENERATION,
                {"score": {"calls": 2, "per": "generation", "caller": SCORE}},
            ),
            ("evaluation", None, {}),
        ],
    )
    def test_is_a_policy_that_the_same_program_keeps(self, tmp_path, program, observed_by, scopes):
        """Executed as it is printed, and enforced."""
        program = getattr(programs, program)
        observe(tmp_path, program, policy=observed_by)
        policy = made_of(suggested(tmp_path))
        found = policy.to_json()
        assert found["scopes"] == scopes
        asked = {kind: tuple(found.get(kind, ())) for kind in STRICT}
        assert asked == (STRICT if scopes else {"requires": (), "ensures": ()})
        guard = enforce(policy, program)
        assert guard.count("training") == 0 or scopes
        assert guard.count() > 0

    def test_of_a_method(self, tmp_path):
        """An average of the weights, taken by a method once per optimizer step."""

        def make():
            return torch.optim.swa_utils.AveragedModel(nn.Linear(4, 4))

        observed_by = CallPolicy({"any": (0, None)}, methods=("update_parameters",))
        observe(tmp_path, programs.ema, module=make(), policy=observed_by)
        code = suggested(tmp_path)
        policy = made_of(code)
        caller = f"{programs.__name__}:EMA.average"
        assert policy.scopes == {"average": Scope(1, per="step", caller=caller)}
        assert policy.methods == ("update_parameters",)
        assert '        "update_parameters",  # 3 calls of it\n' in code
        assert '# 3 calls, 1 in each of 3 windows "step"; the first at' in code
        assert not policy.ensures  # it returns nothing
        enforce(policy, programs.ema, module=make())
        for odd, error in (("twice", BudgetExceeded), ("never", BudgetUnmet)):
            with pytest.raises(error):
                enforce(policy, programs.ema, module=make(), odd=odd)

    @pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")  # of one another
    def test_of_one_model_with_and_without_adapters(self, tmp_path):
        """The policy and its reference are one module, told apart by PEFT's adapters."""
        peft = pytest.importorskip("peft", reason="the extra named test is not installed")
        transformers = pytest.importorskip("transformers")

        def make():
            torch.manual_seed(0)
            config = transformers.LlamaConfig(
                vocab_size=16, hidden_size=8, intermediate_size=8, num_hidden_layers=1,
                num_attention_heads=2, num_key_value_heads=2,
            )  # fmt: skip
            base = transformers.LlamaForCausalLM(config).eval()
            return peft.get_peft_model(base, peft.LoraConfig(target_modules=["q_proj"], r=2)).eval()

        observe(tmp_path, programs.adapters, module=make())
        policy = made_of(suggested(tmp_path))
        caller = f"{programs.__name__}:OneModel.logits"
        assert policy.to_json()["scopes"] == {
            "logits_adapters_on": {"calls": 1, "caller": caller, "when": "adapters_on"},
            "logits_adapters_off": {
                **{"calls": 1, "caller": caller, "when": "adapters_off"},
                **{"requires": ["no_grad"], "ensures": ["detached"]},
            },
        }
        assert policy.to_json()["requires"] == ["eval_mode"]
        enforce(policy, programs.adapters, module=make())
        with pytest.raises(ConditionUnmet, match="no_grad"):
            enforce(policy, programs.adapters, module=make(), odd="with grad")

    def test_frozen_is_asked_of_all_calls_or_of_none(self, tmp_path):
        """It compares with the call before: of one scope alone it would compare with another."""
        observe(tmp_path, programs.moving)
        policy = made_of(suggested(tmp_path))
        assert [*policy.scopes] == ["f", "g"]
        assert not any(scope.requires for scope in policy.scopes.values())
        enforce(policy, programs.moving)


class TestIsStrict:
    @pytest.mark.parametrize(
        ("odd", "error", "message"),
        [
            ("twice", BudgetExceeded, "score: 1 of 1 spent"),
            ("never", BudgetUnmet, "score made 0 of 1 calls"),
            ("in train mode", ConditionUnmet, "eval_mode"),
            ("with grad", ConditionUnmet, "no_grad"),
            ("after a change", ConditionUnmet, "frozen"),
        ],
    )
    def test_what_was_never_seen_is_refused(self, tmp_path, odd, error, message):
        """One call more or less, and each state that is another."""
        observe(tmp_path, programs.dpo)
        policy = made_of(suggested(tmp_path))
        with pytest.raises(error, match=message):
            enforce(policy, programs.dpo, odd=odd)

    def test_another_caller(self, tmp_path):
        """Whoever else calls in training has no scope."""
        observe(tmp_path, programs.dpo)
        policy = made_of(suggested(tmp_path))
        with pytest.raises(UnsanctionedCall):
            enforce(policy, programs.kto)

    @pytest.mark.parametrize(("odd", "error"), [("twice", BudgetExceeded), ("never", BudgetUnmet)])
    def test_a_window(self, tmp_path, odd, error):
        """One more in a whole generation, or one less."""
        observe(tmp_path, programs.grpo, policy=GENERATION)
        policy = made_of(suggested(tmp_path))
        with pytest.raises(error):
            enforce(policy, programs.grpo, odd=odd)

    def test_inference_only(self, tmp_path):
        """Any call in training."""
        observe(tmp_path, programs.evaluation)
        code = suggested(tmp_path)
        assert "policy = CallPolicy(scopes={})\n" in code
        with pytest.raises(UnsanctionedCall):
            enforce(made_of(code), programs.dpo)


class TestWhatWasMissed:
    @pytest.mark.parametrize(
        ("odd", "lines"),
        [
            (
                "twice",
                "exactly 1 per micro-step of score would have been broken 1 time: step 1, "
                "micro-step 0 (2 calls, the last at programs.py in score)",
            ),
            (
                "never",
                "exactly 1 per micro-step of score would have been broken 1 time: step 1, "
                "micro-step 0 (none)",
            ),
            (
                "in train mode",
                "`eval_mode` did not hold of 1 of 8 calls of score: step 1, micro-step 0 at "
                "programs.py in score",
            ),
            (
                "with grad",
                "`no_grad` did not hold of 1 of 8 calls of score: step 1, micro-step 0 at "
                "programs.py in score",
            ),
            (
                "after a change",
                "`frozen` did not hold of 1 of 8 calls of score: step 1, micro-step 0 at "
                "programs.py in score",
            ),
        ],
    )
    def test_is_told_with_its_place(self, tmp_path, odd, lines):
        """What would have broken a stricter contract; the one that is printed holds."""
        observe(tmp_path, programs.dpo, odd=odd)
        code = suggested(tmp_path)
        told = " ".join(code.partition("# A stricter contract would have been broken:")[2].split())
        told = re.sub(
            r"\S*programs\.py:\d+ in (Training\.)?", "programs.py in ", told.replace(" # ", " ")
        )
        assert told == f"# - {lines}"
        enforce(made_of(code), programs.dpo, odd=odd)


class TestAnyProgram:
    @given(st.data())
    @settings(
        max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
    )
    def test_keeps_what_is_suggested_for_it(self, tmp_path_factory, data):
        """Whatever it calls, from where, in what windows and state."""
        folder = tmp_path_factory.mktemp("run")
        program = drawn(data)
        observe(folder, program, policy=OBSERVED_BY)
        result = CliRunner().invoke(main, ["suggest", str(folder)])
        policy = made_of(result.stdout)
        if result.exit_code == 0:
            enforce(policy, program)
        else:
            assert "# Before this holds:" in result.stdout
            assert "outside of any" in result.stdout or "no scope counts per" in result.stdout


OBSERVED_BY = CallPolicy({"kl": (0, None), "any": Scope((0, None), per="generation")})
BLOCKS = {
    "no_grad": torch.no_grad,
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
    "nothing": contextlib.nullcontext,
}
CALLS = st.lists(
    st.tuples(st.sampled_from(["f", "g", "kl"]), st.sampled_from([*BLOCKS])), max_size=3
)


def drawn(data):
    """A training that a strategy has made up."""
    plan = data.draw(
        st.lists(  # generations of micro-steps
            st.tuples(st.booleans(), st.lists(CALLS, max_size=3), CALLS.map(lambda c: c[:1])),
            min_size=1,
            max_size=4,
        )
    )

    def call(guard, caller, block):
        scope = guard.sanctioned("kl") if caller == "kl" else contextlib.nullcontext()
        with BLOCKS[block](), scope:
            {"f": programs.f, "g": programs.g, "kl": programs.f}[caller](guard)

    def program(guard):
        with guard.context("training"):
            for windowed, micro_steps, between in plan:
                window = guard.window("generation") if windowed else guard.window("step")
                with window:
                    for number, calls in enumerate(micro_steps):
                        with guard.micro_step(0, number):
                            for caller, block in calls:
                                call(guard, caller, block)
                    for caller, block in between:
                        call(guard, caller, block)
        with guard.context("inference"):
            programs.f(guard)

    return program
