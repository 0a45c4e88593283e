"""README and docs say what is so: code runs, messages are real, lists are complete."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

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

    def test_the_file_tree_names_every_source_file(self) -> None:
        """A newcomer looks there first."""
        tree = README.partition("## The files")[2]
        sources = [p for p in (ROOT / "src").rglob("*.py") if p.name[0] != "_"]
        assert len(sources) > 20
        assert [p.name for p in sources if p.name not in tree] == []

    def test_the_pictures_and_pages_it_shows_exist(self) -> None:
        """Every relative link."""
        targets = re.findall(r"\]\(([^)]+)\)", README)
        assert targets
        assert all((ROOT / target.replace("%20", " ")).exists() for target in targets)
