"""Fenced blocks of a page, and a reader who does what they say, in order, in a folder of their own.

- ``python title="train.py"`` is a file of that name.
- ``python`` with tests in it is run by pytest; other python is run in one namespace for the page.
- ``text`` is what the python block before it prints.
- ``console`` has commands after ``$``, run for real, and what they print. ``make`` only says what
  it would do.

An ellipsis stands for what differs from run to run: within a line, or alone for any lines. What is
not run says why in the line above it: ``<!-- not run: takes 11 minutes -->``.
"""

import contextlib
import io
import os
import re
import shlex
import signal
import subprocess
import sys
import sysconfig
import warnings
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import click

ROOT = Path(__file__).parents[1]
_FENCE = re.compile(
    r"(?:^[ ]*<!-- not run: (?P<reason>[^\n]+) -->\n)?"
    r"^(?P<indent>[ ]*)```(?P<language>\w+)(?: title=\"(?P<title>[\w./]+)\")?\n"
    r"(?P<text>.*?)"
    r"^(?P=indent)```$",
    flags=re.MULTILINE | re.DOTALL,
)
_COMMAND = re.compile(r"^\$ (?P<command>.*)\n(?P<shown>(?:(?!\$ ).*\n)*)", flags=re.MULTILINE)


@dataclass(frozen=True)
class Block:
    """One fenced block.

    Attributes:
        place: page and line, for messages.
        title: name of the file that it is, or None.
        not_run: why it is not run, or None.
    """

    place: str
    language: str
    title: str | None
    text: str
    not_run: str | None


def blocks_of(page: Path, root: Path = ROOT) -> list[Block]:
    """The blocks of a page, from top to bottom.

    Raises:
        ValueError: a fence that none of them begins or ends with.
    """
    content = page.read_text()
    name = page.relative_to(root).as_posix()
    found = []
    for fence in _FENCE.finditer(content):
        line = content.count("\n", 0, fence.start("language")) + 1
        text = re.sub(rf"^{fence['indent']}", "", fence["text"], flags=re.MULTILINE)
        place = f"{name}:{line}"
        found.append(Block(place, fence["language"], fence["title"], text, fence["reason"]))
    if len(re.findall(r"^ *```", content, flags=re.MULTILINE)) != 2 * len(found):
        raise ValueError(
            f'{name} has a fence that is no block: write ```LANGUAGE or ```LANGUAGE title="FILE"'
        )
    return found


def commands_of(block: Block) -> list[tuple[list[str], str]]:
    """Words and shown output of every command in a console block; comments are left out."""
    found = _COMMAND.finditer(block.text)
    return [(shlex.split(one["command"], comments=True), one["shown"]) for one in found]


def check_command(words: list[str]) -> None:
    """That a command which is not run could be: its program, its file, its options.

    Raises:
        ValueError, click.UsageError: it could not.
    """
    if words[0] == "torchrun":  # what it starts; its own options are torch's
        words = words[words.index("-m") + 1 :]
    program, *arguments = words
    if program == "make":
        subprocess.run(["make", "--dry-run", *arguments], cwd=ROOT, check=True, capture_output=True)
    elif program == "python" and (ROOT / arguments[0]).is_file():
        pass
    elif program in ("lensnet-guard", "megacontext"):
        group: click.Group = import_module(f"{program.replace('-', '_')}.cli").main
        _, command, rest = group.resolve_command(click.Context(group), arguments)
        assert command is not None
        command.make_parser(click.Context(command)).parse_args(rest)
    else:
        raise ValueError(f"{shlex.join(words)!r} is nothing that this project or its examples have")


class Reader:
    """Does what the blocks of one page say.

    Args:
        folder: where; it has the examples, as a checkout has.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.namespace: dict[str, Any] = {"__name__": "__main__"}
        self.printed: str | None = None  # by the block before

    def follow(self, block: Block) -> None:
        """Do what one block says, unless it is not to be run.

        Raises:
            AssertionError: something else was printed, or a command failed.
        """
        printed, self.printed = self.printed, None
        if block.not_run is not None:
            return
        if block.language == "python" and block.title is not None:
            (self.folder / block.title).write_text(block.text)
        elif block.language == "python" and re.search(r"^ *def test_", block.text, re.MULTILINE):
            path = self.folder / f"test_{block.place.rpartition(':')[2]}.py"
            path.write_text(block.text)
            self._run(["pytest", "--quiet", path.name], "")
        elif block.language == "python":
            with contextlib.redirect_stdout(io.StringIO()) as output, warnings.catch_warnings():
                warnings.simplefilter("ignore", DeprecationWarning)  # torch's own, as for a user
                exec(compile(block.text, block.place, "exec"), self.namespace)
            self.printed = output.getvalue()
        elif block.language == "text" and printed is not None:
            check_printed(block.text, printed)
        elif block.language == "console":
            for words, shown in commands_of(block):
                self._run(words, shown)
        else:
            raise AssertionError(
                f"nobody knows how to run this block of {block.language}; "
                "if it is none to run, say above it: <!-- not run: REASON -->"
            )

    def _run(self, words: list[str], shown: str) -> None:
        if words[0] == "make":
            check_command(words)
            return
        scripts = sysconfig.get_path("scripts")
        environment = {
            "PATH": f"{scripts}{os.pathsep}{os.environ['PATH']}",
            "PYTHONPATH": os.environ.get("PYTHONPATH", ""),
            "HOME": str(self.folder),
            "COLUMNS": "80",
            "OMP_NUM_THREADS": "1",
        }
        program = sys.executable if words[0] == "python" else words[0].removeprefix(".venv/bin/")
        done = subprocess.run(
            [sys.executable if program == "python" else program, *words[1:]],
            cwd=self.folder,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=300,
        )
        printed = done.stdout
        if done.returncode < 0:  # as a shell says it
            printed += f"{signal.strsignal(-done.returncode)}\n"
        if shown:
            check_printed(shown, printed)
        else:
            assert done.returncode == 0, f"{shlex.join(words)} failed:\n{printed}"


def check_printed(shown: str, printed: str) -> None:
    """That a page shows what is printed, but for what its ellipses stand for.

    Raises:
        AssertionError: it does not; the message has what was printed, to be copied.
    """
    lines = [line.rstrip() for line in shown.splitlines()]
    pattern = "".join(
        r"(?:.*\n)*?" if line == "…" else f"{re.escape(line).replace('…', '.*')}\n"
        for line in lines
    )
    actual = "".join(f"{line.rstrip()}\n" for line in printed.splitlines())
    assert re.fullmatch(pattern, actual), f"the page shows\n{shown}\nbut printed is\n{actual}"
