"""The matrix: its page takes a row at a time, its environments are made once, Pythons are found."""

import importlib.util
import json
import re
import sys
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture
def matrix(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The script as a module, with a page and a cache folder of its own."""
    spec = importlib.util.spec_from_file_location("matrix", ROOT / "benchmarks" / "matrix.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "matrix", module)
    spec.loader.exec_module(module)
    monkeypatch.setattr(module, "PAGE", tmp_path / "page.md")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return module


def row(torch: str, tests: str) -> list[str]:
    return [torch, "3.12.1", "2.6.6", "1.15.0", "5.24.0", tests, "ok", "600"]


class TestPage:
    def test_has_both_markers(self, matrix: ModuleType) -> None:
        """That a run of hours does not end in an error."""
        page = (ROOT / "docs" / "compatibility.md").read_text()
        assert page.index(matrix.BEGIN) < page.index(matrix.END)

    def test_takes_rows_in_any_order(self, matrix: ModuleType) -> None:
        """Each in its place, the newest of a minor alone; what stands around the table stays."""
        old = matrix.table([row("1.13.1", "1 passed"), row("2.15.0", "1 failed")])
        matrix.PAGE.write_text(f"# A\n{matrix.BEGIN}\n\n{old}\n\n{matrix.END}\nB\n")
        for torch in ("2.11.0", "2.15.1", "2.7.1"):
            matrix.write(row(torch, "9 passed"))
        rows = [row(torch, "9 passed") for torch in ("2.7.1", "2.11.0", "2.15.1")]
        expected = f"# A\n{matrix.BEGIN}\n\n{matrix.table(rows)}\n\n{matrix.END}\nB\n"
        assert matrix.PAGE.read_text() == expected

    def test_without_markers(self, matrix: ModuleType) -> None:
        """Nothing is written."""
        matrix.PAGE.write_text("# A\n")
        with pytest.raises(SystemExit, match="has lost its markers"):
            matrix.write(row("2.7.1", "9 passed"))
        assert matrix.PAGE.read_text() == "# A\n"


class TestInterpreter:
    def test_that_is_there(self, matrix: ModuleType) -> None:
        """Of the minor version that is asked for."""
        mine = "{}.{}".format(*sys.version_info)
        path, version = matrix.interpreter(mine)
        assert version.startswith(f"{mine}.")
        assert Path(path).exists()

    def test_that_is_not(self, matrix: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
        """Another one is taken, and that is told."""
        assert matrix.interpreter("3.99")[0] == sys.executable
        assert "no Python 3.99 is at hand: " in capsys.readouterr().err


class TestEnvironment:
    @pytest.fixture
    def made(self, matrix: ModuleType, monkeypatch: pytest.MonkeyPatch) -> list[str]:
        """What uv is asked for, instead of asking it: installing takes a minute."""
        asked: list[str] = []

        def uv(*arguments: str) -> None:
            asked.append(" ".join(arguments))
            if arguments[0] == "venv":
                Path(arguments[-1]).mkdir(parents=True)

        monkeypatch.setattr(matrix, "uv", uv)
        return asked

    def test_is_made_once(self, matrix: ModuleType, made: list[str]) -> None:
        """Later only this checkout is installed: it may be in another place."""
        setting = matrix.Setting("2.15.0", "3.99")
        python = matrix.environment(setting)
        assert [asked.split()[0] for asked in made] == ["venv", "pip", "pip"]
        made.clear()
        assert matrix.environment(setting) == python
        (ours,) = made
        assert ours.endswith(f"--no-deps --editable {ROOT}")

    def test_is_made_anew_when_its_needs_change(
        self, matrix: ModuleType, made: list[str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """As when pyproject.toml admits other versions."""
        setting = matrix.Setting("2.15.0", "3.99")
        matrix.environment(setting)
        made.clear()
        monkeypatch.setattr(matrix, "dependencies", lambda: "more")
        matrix.environment(setting)
        assert len(made) == 3

    def test_that_could_not_be_made_was_taken_for_made(
        self, matrix: ModuleType, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """A failed installation leaves no stamp."""

        def fail(*arguments: str) -> None:
            if arguments[0] == "pip":
                raise SystemExit("no network")
            Path(arguments[-1]).mkdir(parents=True)

        monkeypatch.setattr(matrix, "uv", fail)
        with pytest.raises(SystemExit, match="no network"):
            matrix.environment(matrix.Setting("2.15.0", "3.99"))
        assert list(matrix.cache_folder().rglob("made-from.json")) == []

    def test_follows_the_constraints_but_for_torch(
        self, matrix: ModuleType, made: list[str]
    ) -> None:
        """And the row of the oldest has no constraints but torch."""
        for oldest in (False, True):
            python = matrix.environment(matrix.Setting("2.7.1", "3.99", oldest))
            needed = json.loads((python.parents[1] / "made-from.json").read_text())
            lines = needed[3].splitlines()
            assert [line for line in lines if line.startswith("torch==")] == ["torch==2.7.1"]
            assert (len(lines) == 1) == oldest
        assert sum("--resolution lowest-direct" in asked for asked in made) == 1


class TestInternals:
    def test_are_tests_that_exist(self, matrix: ModuleType) -> None:
        """A renamed file would end the run on the newest torch."""
        folder = ROOT / matrix.SUITE[0]
        assert [name for name in matrix.INTERNALS if not (folder / name).exists()] == []


class TestWorkflow:
    def test_has_a_job_for_every_row(self, matrix: ModuleType) -> None:
        """With that row's Python: the workflow cannot ask the script."""
        workflow = (ROOT / ".github" / "workflows" / "ci.yml").read_text()
        jobs = re.findall(r'- {torch: "([\d.]+)", python: "([\d.]+)"}', workflow)
        assert jobs == [(matrix.minor(setting), setting.python) for setting in matrix.MATRIX]
