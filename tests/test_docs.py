"""README and docs say what is so: code runs, messages are real, lists are complete."""

import re
import subprocess
import sys
from pathlib import Path
from unittest.mock import MagicMock

import pytest
import torch
from torch import nn

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
RECIPE = (ROOT / "docs" / "LensNet Pairwise Training.md").read_text()


def run(*arguments: str, cwd: Path) -> str:
    command = [sys.executable, *arguments]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, check=True).stdout


class TestViolationExample:
    @pytest.mark.parametrize("page", [README, RECIPE], ids=["README", "recipe"])
    def test_the_message_on_the_page_is_the_one_that_is_printed(self, page: str) -> None:
        """Run from the project's folder, as the README says."""
        printed = run("examples/violation.py", cwd=ROOT)
        assert printed.startswith("UnsanctionedCall: ")
        assert f"```text\n{printed}```" in page


class TestReadme:
    def test_its_python_runs(self, tmp_path: Path) -> None:
        """The block under "Guard your own module", in an empty folder."""
        (block,) = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)
        script = tmp_path / "guarded.py"
        script.write_text(block)
        lines = run(str(script), cwd=tmp_path).splitlines()
        assert lines[0] == "3 ()"
        assert "guarded.py" in lines[1]
        assert (tmp_path / "runs/42/lensnet.rank0.jsonl").exists()

    def test_the_file_tree_names_every_file(self) -> None:
        """A newcomer looks there first."""
        tree = README.partition("## The files")[2]
        folders = ("src", "docs", "examples", "benchmarks")
        files = [p for f in folders for p in (ROOT / f).rglob("*.*") if p.suffix in (".py", ".md")]
        named = [p.name for p in files if not p.name.startswith("__")]
        assert len(named) > 20
        assert [name for name in named if name not in tree] == []


class TestTestingPage:
    def test_its_test_passes_in_an_empty_folder(self, pytester: pytest.Pytester) -> None:
        """With what the installation brings, and no conftest."""
        page = (ROOT / "docs" / "testing.md").read_text()
        (block,) = re.findall(r"```python\n(.*?)```", page, flags=re.DOTALL)
        pytester.makepyfile(block)
        pytester.runpytest_subprocess().assert_outcomes(passed=1)

    def test_why_not_a_mock(self) -> None:
        """What the page says of mocks."""
        module, calls = nn.Linear(1, 1), MagicMock()
        object.__setattr__(module, "__call__", calls)
        module(torch.ones(1, 1))
        assert calls.call_count == 0
        owner = nn.Module()
        owner.critic = module
        with pytest.raises(TypeError, match=r"cannot assign .* as child module"):
            owner.critic = MagicMock(wraps=module)


class TestBlocksThatRun:
    @pytest.mark.parametrize(
        ("page", "last"),
        [
            (
                "any-language-model",
                "4 micro-steps, 4 LensNet calls, 0 violations; 1 inference call",
            ),
            ("metrics", "step 4: loss "),
        ],
    )
    def test_in_an_empty_folder(self, tmp_path: Path, page: str, last: str) -> None:
        """The one block that is marked as Python; it prints what the page says."""
        text = (ROOT / "docs" / f"{page}.md").read_text()
        (block,) = re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL)
        (tmp_path / "block.py").write_text(block)
        assert run("block.py", cwd=tmp_path).splitlines()[-1].startswith(last)


PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


class TestLinks:
    @pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
    def test_lead_somewhere(self, page: Path) -> None:
        """Every relative link to a page or a picture."""
        prose = re.sub(r"`[^`]*`", "", page.read_text())
        targets = re.findall(r"\]\(([^)#]+)[^)]*\)", prose)
        missing = [t for t in targets if not (page.parent / t.replace("%20", " ")).exists()]
        assert missing == []

    def test_the_guard_page_names_tests_that_exist(self) -> None:
        """A row of its table without a test is a claim without proof."""
        page = (ROOT / "docs" / "guard.md").read_text()
        rows = re.findall(r"\| `([\w/]+\.py)` \|$", page, flags=re.MULTILINE)
        assert len(rows) > 10
        assert all((ROOT / "tests" / "lensnet_guard" / name).exists() for name in rows)
