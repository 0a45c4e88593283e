"""README and docs say what is so: every code block runs, messages are real, lists are complete."""

import re
import shutil
import subprocess
import sys
from pathlib import Path
from unittest.mock import MagicMock

import pytest
import torch
from tests.doc_blocks import Block, Reader, blocks_of, check_command, check_printed, commands_of
from torch import nn

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
PAGES = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").rglob("*.md"))]
BLOCKS = {page.stem: blocks for page in PAGES if (blocks := blocks_of(page))}
NOT_RUN = [block for blocks in BLOCKS.values() for block in blocks if block.not_run]


@pytest.mark.skipif(sys.version_info < (3, 11), reason="pages show qualified names: 3.11+")
class TestBlocks:
    @pytest.mark.parametrize("page", BLOCKS)
    def test_run_and_print_what_the_page_shows(
        self, page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """From top to bottom, in an empty folder that has the examples beside it."""
        shutil.copytree(ROOT / "examples", tmp_path / "examples")
        monkeypatch.chdir(tmp_path)
        reader = Reader(tmp_path)
        for block in BLOCKS[page]:
            try:
                reader.follow(block)
            except Exception as error:
                raise AssertionError(f"{block.place}: {error}") from error

    @pytest.mark.parametrize("block", NOT_RUN, ids=lambda block: block.place)
    def test_that_are_not_run_say_why(self, block: Block) -> None:
        """Each is a skipped test, so that they are counted; ``pytest -rs`` lists the reasons."""
        if block.language == "console":
            for words, _ in commands_of(block):
                check_command(words)
        pytest.skip(str(block.not_run))


class TestReader:
    """That a block which does not do what its page says is noticed."""

    def follow(self, folder: Path, page: str) -> None:
        path = folder / "page.md"
        path.write_text(page)
        reader = Reader(folder)
        for block in blocks_of(path, folder):
            reader.follow(block)

    @pytest.mark.parametrize(
        ("page", "error"),
        [
            ("```python\n1 / 0\n```\n", "division by zero"),
            ("```python\nprint(1)\n```\n```text\n2\n```\n", "but printed is\n1\n"),
            ("```python\ndef test_it():\n    assert False\n```\n", "1 failed"),
            ("```console\n$ python -c 'exit(3)'\n```\n", "exit.* failed"),
            ("```console\n$ python -c 'print(1)'\n2\n```\n", "but printed is\n1\n"),
            ("```text\n2\n```\n", "nobody knows how to run"),
            ("```rust\n2\n```\n", "nobody knows how to run"),
            ("```\n2\n```\n", "page.md has a fence that is no block"),
            ("```python\n2\n", "page.md has a fence that is no block"),
        ],
    )
    def test_refuses(self, tmp_path: Path, page: str, error: str) -> None:
        """With a message that tells how to mend the page."""
        with pytest.raises((AssertionError, ValueError, ZeroDivisionError), match=error):
            self.follow(tmp_path, page)

    def test_follows_a_page(self, tmp_path: Path) -> None:
        """Files, one namespace, output, ellipses, an indented block, a reason."""
        self.follow(
            tmp_path,
            '```python title="a.py"\nprint("a", 7)\nprint("b")\nprint("c")\n```\n'
            "```console\n$ python a.py  # a comment\na …\n…\nc\n```\n"
            "```python\nx = 2\n```\n- in a list:\n\n  ```python\n  print(x)\n  ```\n"
            "```text\n2\n```\n<!-- not run: it waits -->\n```python\ninput()\n```\n",
        )

    @pytest.mark.parametrize(
        "command",
        ["make nothing", "python no.py", "megacontext train --sped 9", "megacontext tran", "rm x"],
    )
    def test_commands_that_do_not_exist(self, command: str) -> None:
        """Also in blocks that are not run."""
        with pytest.raises(Exception, match=r"make|nothing that|No such"):
            check_command(command.split())

    def test_an_ellipsis_stands_for_nothing_too(self) -> None:
        """But for no part of a line that is shown."""
        check_printed("a\n…\nb\n", "a\nb\n")
        with pytest.raises(AssertionError):
            check_printed("a\n…\nb\n", "a\nbc\n")


class TestReadme:
    def test_its_list_names_every_folder_of_the_sources(self) -> None:
        """And none that is not there: a newcomer looks there first."""
        listed = README.partition("The folders:")[2].partition("```\n\n")[0]
        entries = re.findall(r"^(src/\w+/|  \w+/) {2,}\S.*$", listed, flags=re.MULTILINE)
        package, named = "", set()
        for entry in entries:
            package = entry if entry.startswith("src/") else package
            named.add(package if entry == package else package + entry.strip())
        folders = {path.parent for path in (ROOT / "src").rglob("*.py")}
        assert named == {f"{folder.relative_to(ROOT).as_posix()}/" for folder in folders}


class TestTestingPage:
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


class TestArchitecture:
    def test_is_what_the_code_imports(self) -> None:
        """The picture and the table are those that the script would make now."""
        pytest.importorskip("grimp", reason="the extra named dev is not installed")
        command = [sys.executable, "docs/draw_architecture.py", "--check"]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=100)
        assert done.returncode == 0, done.stderr

    def test_the_walks_lead_past_modules_that_exist(self) -> None:
        """Every name of one, with its folder, is a file of one of the packages."""
        walks = (ROOT / "docs" / "architecture.md").read_text().partition("## Who imports")[0]
        named = set(re.findall(r"`([a-z]+/\w+)", walks))
        packages = [ROOT / "src" / "lensnet_guard", ROOT / "src" / "megacontext"]
        assert len(named) > 30
        assert [
            n for n in sorted(named) if not any((p / f"{n}.py").exists() for p in packages)
        ] == []


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
