"""The examples of the integrations, with and without their bugs."""

import runpy
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]

CASES = {
    "lightning_ema_teacher": (
        "lightning",
        "teacher: 16 micro-steps, 16 training calls (distillation 16), 18 inference calls, ",
        "UnsanctionedCall: teacher was called in training outside its sanctioned scope.",
    ),
    "transformers_reference": (
        "transformers",
        "reference: 8 micro-steps, 8 training calls (reference 8), 2 inference calls, ",
        "BudgetExceeded: reference was called in training more often than its budget allows.",
    ),
    "trl_dpo": (
        "trl",
        "ref_model: 8 micro-steps, 8 training calls (reference 8), 2 inference calls, ",
        "UnsanctionedCall: ref_model was called in training outside its sanctioned scope.",
    ),
    "accelerate_critic": (
        "accelerate",
        "critic: 24 micro-steps, 24 training calls (values 24), 3 inference calls, ",
        "BudgetUnmet: A micro-step ended before the call budget of critic was met: "
        "values made 0 of 1 calls.",
    ),
}


@pytest.fixture
def run(monkeypatch, capsys, tmp_path, fresh_accelerate):
    """Run an example here, which spares half a minute of imports, and give back what it prints."""

    def run(name, *options):
        pytest.importorskip(CASES[name][0])
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(sys, "argv", [f"{name}.py", *options])
        runpy.run_path(str(ROOT / "examples" / f"{name}.py"), run_name="__main__")
        assert list(tmp_path.iterdir()) == []
        return capsys.readouterr().out

    return run


@pytest.mark.parametrize("name", CASES)
@pytest.mark.filterwarnings("ignore:.*isinstance.treespec, LeafSpec.*:FutureWarning")
@pytest.mark.filterwarnings("ignore:.*does not have many workers")
@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.* is deprecated:FutureWarning")
class TestExamples:
    def test_ends_with_a_clean_verdict(self, run, name):
        """And leaves no file behind."""
        assert f"{CASES[name][1]}0 violations\n" in run(name)

    def test_shows_the_violation_when_broken(self, run, name):
        """With the line that made it, as the last thing it says."""
        said = run(name, "--break-it")
        row = "due from     " if "BudgetUnmet" in CASES[name][2] else "called from  "
        assert f"{CASES[name][2]}\n  {row}" in said
        assert f"examples/{name}.py:" in said
        assert "verdict" not in said
