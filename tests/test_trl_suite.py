"""TRL's tests under a guard: how runs are compared, what goes into the page, whose errors count."""

import importlib.util
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from lensnet_guard import LensNetViolation

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / "benchmarks"


def script(name: str, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, FOLDER / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, name, module)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def suite(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The script as a module, with a page of its own."""
    module = script("trl_suite", monkeypatch)
    monkeypatch.setattr(module, "PAGE", tmp_path / "page.md")
    return module


def run(mode: str, outcome: str = "passed", **changes: Any) -> dict[str, Any]:
    """A run as the plugin writes it; of a training that logged a loss of 1."""
    training = {"guarded": ["ref_model"] if mode != "none" else []}
    training |= {"nothing": "", "violations": 0, "logged": '[{"loss": 1.0}]'}
    training |= {key: changes.pop(key) for key in list(changes) if key in training}
    name = changes.pop("name", "tests/test_dpo_trainer.py::TestDPO::test_train")
    fields = {"name": name, "mode": mode, "outcome": outcome, "error": "", "ours": False}
    return {**fields, "trainings": [training], **changes}


class TestVersions:
    def test_results_of_other_versions(self, suite: ModuleType, tmp_path: Path) -> None:
        """They are not told as if they were of what is installed."""
        suite.check_versions(tmp_path)
        suite.check_versions(tmp_path)
        file = tmp_path / "versions.txt"
        file.write_text("trl 0.1")
        with pytest.raises(SystemExit, match=r"has results of trl 0\.1, and installed is trl \d"):
            suite.check_versions(tmp_path)
        assert file.read_text() == "trl 0.1"


class TestComparing:
    def test_the_same_in_all_modes(self, suite: ModuleType) -> None:
        """Agrees in both, with the same losses."""
        row = suite.compare("dpo", [run("none"), run("enforce"), run("observe")], 4)
        assert row.cells == ["dpo", "4", "1", "0", "0", "1", "1", "1", "1"]
        assert row.differ == []

    def test_a_refusal(self, suite: ModuleType) -> None:
        """Differs, and says that it is the guard's."""
        refused = run("enforce", "failed", error="BudgetExceeded: ref_model", ours=True)
        row = suite.compare("dpo", [run("none"), refused, run("observe")], 4)
        assert (row.agree, row.guarded) == ({"enforce": 0, "observe": 1}, 1)
        assert row.differ == [
            "TestDPO::test_train, enforce: failed, the guard: BudgetExceeded: ref_model"
        ]

    @pytest.mark.parametrize(
        ("changed", "why"),
        [
            ({"violations": 2}, "2 violations"),
            ({"guarded": []}, "nothing was guarded"),
            ({"logged": '[{"loss": 1.1}]'}, "other losses"),
            ({"outcome": "failed", "error": "IndexError: 3"}, "failed, IndexError: 3"),
        ],
    )
    def test_what_passes_and_differs(
        self, suite: ModuleType, changed: dict[str, Any], why: str
    ) -> None:
        """Is no agreement: violations, a guard that never was, other losses, another error."""
        row = suite.compare("dpo", [run("none"), run("enforce"), run("observe", **changed)], 4)
        assert row.agree == {"enforce": 1, "observe": 0}
        assert row.differ == [f"TestDPO::test_train, observe: {why}"]

    def test_apart(self, suite: ModuleType) -> None:
        """What fails by itself, and what has no contract, is neither agreement nor difference."""
        failing = run("none", "failed", name="tests/a.py::test_gpu", error="no CUDA")
        nothing = run("none", name="tests/a.py::test_sft", nothing="no contract is known of SFT")
        stopped = run("none", name="tests/a.py::test_stopped")
        row = suite.compare("sft", [failing, nothing, stopped], 4)
        assert row.cells == ["sft", "4", "2", "1", "1", "0", "0", "0", "0"]


class TestPage:
    def test_has_both_markers(self, suite: ModuleType) -> None:
        """That a run of hours does not end in an error."""
        page = (ROOT / "docs" / "trl.md").read_text()
        assert page.index(suite.BEGIN) < page.index(suite.END)

    def test_between_them(self, suite: ModuleType) -> None:
        """What stands around them stays; what differs has a line."""
        suite.PAGE.write_text(f"# A\n{suite.BEGIN}\nold\n{suite.END}\nB\n")
        refused = run("enforce", "failed", error="BudgetUnmet", ours=True)
        row = suite.compare("dpo", [run("none"), refused, run("observe")], 4)
        suite.write(suite.markdown([row], "the command"))
        text = suite.PAGE.read_text()
        assert text.startswith(f"# A\n{suite.BEGIN}\n\n`the command`, ")
        assert text.endswith(f"{suite.END}\nB\n")
        assert "| dpo | 4 | 1 | 0 | 0 | 1 | 0 | 1 | 1 |" in text
        assert "- dpo: `TestDPO::test_train, enforce: failed, the guard: BudgetUnmet`" in text
        assert "\n1 of 4 tests were run; these differ.\n" in text
        assert "old" not in text

    def test_a_folder_that_is_no_checkout(self, suite: ModuleType, tmp_path: Path) -> None:
        """Is told, before anything is made."""
        with pytest.raises(SystemExit, match="is no checkout of TRL"):
            suite.files_of(tmp_path)


class TestPlugin:
    def test_whose_error(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """The guard's own, and one that it has caused; not another's."""
        plugin = script("trl_guard_plugin", monkeypatch)
        caused = RuntimeError("in a test")
        caused.__cause__ = LensNetViolation("refused")
        found = [plugin.is_ours(error) for error in (caused.__cause__, caused, ValueError("b"))]
        assert found == [True, True, False]

    def test_times_are_not_compared(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Losses are."""
        plugin = script("trl_guard_plugin", monkeypatch)

        class Trained:
            class state:  # noqa: N801
                log_history = [{"loss": 0.5, "train_runtime": 3.1, "step_time": 2.0}]  # noqa: RUF012

        assert plugin.logged_by(Trained()) == '[{"loss": 0.5}]'

    def test_files_take_turns(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """First parameters before others, and the modes of a test together."""
        plugin = script("trl_guard_plugin", monkeypatch)

        class Item:
            def __init__(self, name: str, mode: str) -> None:
                self.nodeid, self.callspec = name, self
                self.params = {"trl_guard": mode}

        tests = {"a::x[none-none]": "none", "a::x[none-2]": "none", "a::x[observe-none]": "observe"}
        tests |= {"a::y[none]": "none", "b::z[none]": "none"}
        items = [Item(name, mode) for name, mode in tests.items()]
        found = [plugin.name_of(item) for item in plugin.in_turns(items)]
        assert found == [
            ("a::x[none]", "none"),
            ("a::x[none]", "observe"),
            ("b::z", "none"),
            ("a::y", "none"),
            ("a::x[2]", "none"),
        ]
