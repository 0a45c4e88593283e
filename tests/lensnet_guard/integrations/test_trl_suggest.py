"""``lensnet-guard suggest`` writes the contract of each preset from an observed run."""

import random
import warnings
from types import MappingProxyType

import pytest
from click.testing import CliRunner

pytest.importorskip("trl", reason="TRL comes with the extra trl")

from lensnet_guard import CallPolicy, frozen_base
from lensnet_guard.cli import main
from lensnet_guard.integrations._preset import contracts_of
from lensnet_guard.integrations.presets import as_policy
from lensnet_guard.integrations.transformers import guarded_trainer

pytestmark = [
    pytest.mark.usefixtures("still_heap", "fresh_accelerate"),
    pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning"),  # TRL's own
]

# The teacher's wrapper is called by a function of the library's that redirects its forward; what is
# observed is that function, and the preset names the one that has it redirected.
REDIRECTED = {
    "trl.trainer.distillation_trainer:DistillationTrainer._compute_loss": (
        "trl.models.utils:_ForwardRedirection.__call__"
    )
}
# What nobody asks of a call that is only observed.
NOT_ASKED = {frozen_base, as_policy}
OFTEN = {"gradient_accumulation_steps": 4, "max_steps": 4}
CASES = [
    ("dpo", {"gradient_accumulation_steps": 4}),
    ("kto", {}),
    ("grpo", {**OFTEN, "num_iterations": 2}),
    ("rloo", {"steps_per_generation": 2}),
    ("online_dpo", {}),
    ("gkd", {"seq_kd": True, "lmbda": 0.5, "gradient_accumulation_steps": 4}),
    ("distillation", {}),
    ("reward", {"gradient_accumulation_steps": 4}),
    ("dpo", {"peft": True}),
    ("kto", {"peft": True}),
    ("online_dpo", {"peft": True}),
]


@pytest.mark.parametrize(("kind", "options"), CASES)
def test_reproduces_the_preset(make, tmp_path, kind, options):
    """The same callers, as often, in the same windows; and all that the preset asks for holds."""
    trainer = make(kind, **options)
    contracts = contracts_of(trainer)
    observed = {
        name: CallPolicy({}, methods=contract.methods, parts=contract.parts)
        for name, contract in contracts.items()
    }
    random.seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # what was observed, at the block's end
        with guarded_trainer(trainer, observed, mode="observe", log=tmp_path / "log"):
            trainer.train()
    suggested = suggestion(tmp_path / "log", list(contracts))
    for name, contract in contracts.items():
        assert scopes_of(suggested[name]) == scopes_of(contract, REDIRECTED)
        asked = {*contract.requires, *conditions_of(contract)} - NOT_ASKED
        assert asked <= {*suggested[name].requires, *conditions_of(suggested[name])}


def suggestion(log, names):
    """The policies that the command prints, as a program that runs."""
    done = CliRunner().invoke(main, ["suggest", str(log)])
    assert done.exit_code in (0, 1), done.output
    namespace = {}
    exec(done.stdout, namespace)
    return namespace.get("policies") or {names[0]: namespace["policy"]}


def scopes_of(contract, callers=MappingProxyType({})):
    """Who makes the calls, how many, in which window."""
    return sorted(
        (callers.get(scope.caller, scope.caller), str(scope.calls), scope.per)
        for scope in contract.in_full.values()
    )


def conditions_of(contract):
    """What its scopes ask for, besides."""
    return [condition for scope in contract.in_full.values() for condition in scope.requires]
