"""The doctor: a real process that tries each mechanism, and says so where one is taken away."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from rich.console import Console
from torch import nn

from lensnet_guard.doctor import Examination, Finding
from lensnet_guard.doctor.attempt import attempt
from lensnet_guard.doctor.examination import ANSWER, MECHANISMS, try_alone
from lensnet_guard.doctor.mechanisms import MECHANISMS as TRIED
from lensnet_guard.doctor.render import render

# What takes a mechanism away, and what its row then says.
TAKEN = {
    "torch": ("import torch\ntorch.Tensor.matmul = torch.Tensor.mul", "2 x 2 ones make no 8"),
    "bypass": (
        "import lensnet_guard\n"
        "guard_module = lensnet_guard.guard_module\n"
        "def unarmed(module, **how):\n"
        "    classes = {part: type(part) for part in module.modules()}\n"
        "    guard = guard_module(module, **how)\n"
        "    for part, own in classes.items():\n"
        "        vars(object)['__class__'].__set__(part, own)\n"
        "    return guard\n"
        "lensnet_guard.guard_module = unarmed",
        "the module itself is let through",
    ),
    "recompute": (
        "import torch.utils.checkpoint as tool\n"
        "tool.checkpoint = lambda run, x, use_reentrant: run(x)",
        "0 recomputes were recorded, not 1",
    ),
    "reentrant": ("import os\nos.abort()", "its process ended with SIGABRT and no answer"),
    "compile": (
        "import torch, lensnet_guard\n"
        "sanctioned = lensnet_guard.Guard.sanctioned\n"
        "def compiles_anew(guard, scope):\n"
        "    torch.compiler.reset()\n"
        "    return sanctioned(guard, scope)\n"
        "lensnet_guard.Guard.sanctioned = compiles_anew",
        "graphs compiled by the four calls: [1, 1, 1, 1]",
    ),
    "log": (
        "import lensnet_guard\nlensnet_guard.Guard.start_log = lambda guard, folder: None",
        "FileNotFoundError: no ",
    ),
    "ranks": (
        "import contextlib, lensnet_guard\nlensnet_guard.compare_ranks = contextlib.nullcontext",
        "the ranks saw: 2 alike, then nothing | 2 alike, then nothing",
    ),
}
# Runs in every process of the doctor, before anything else.
SITECUSTOMIZE = f"""
import sys
TAKEN = { {name: code for name, (code, _) in TAKEN.items()}!r}
command = sys.orig_argv
name = "ranks" if "rank(1" in command[-1] else command[3] if len(command) > 3 else ""
exec(TAKEN.get(name, ""))
"""


def run_doctor(*arguments: str, path: Path) -> subprocess.CompletedProcess[str]:
    """The command in a process of its own, that imports from ``path`` first."""
    paths = [str(path), *(str(Path(p).absolute()) for p in sys.path)]
    return subprocess.run(
        [sys.executable, "-m", "lensnet_guard", "doctor", *arguments],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(paths), "COLUMNS": "200"},
        capture_output=True,
        text=True,
        timeout=300,
    )


class TestDoctor:
    def test_where_everything_holds(self, tmp_path: Path) -> None:
        """Every mechanism has its row, nothing fails, and the exit code is 0."""
        done = run_doctor(path=tmp_path)
        assert done.returncode == 0, done.stdout + done.stderr
        versions, _, rows = done.stdout.partition("mechanism ")
        lines = rows.splitlines()
        for name in MECHANISMS.values():
            (row,) = (line for line in lines if line.startswith(f"{name}  "))
            assert " holds " in row or name == "CUDA graphs"
        assert f" {torch.__version__.partition('+')[0]}" in versions  # or with what it is for
        assert lines[-1] == "all that was tried holds"
        if not torch.cuda.is_available():
            assert any("not tried" in line and "torch sees no GPU" in line for line in lines)

    def test_where_mechanisms_are_taken_away(self, tmp_path: Path) -> None:
        """Each one's row fails, the crash of one does not stop the rest, the exit code is 1."""
        (tmp_path / "sitecustomize.py").write_text(SITECUSTOMIZE)
        done = run_doctor("--json", path=tmp_path)
        assert done.returncode == 1, done.stderr
        found = json.loads(done.stdout)
        assert found["holds"] is False
        assert torch.__version__.startswith(found["versions"]["torch"])  # or with what it is for
        assert found["versions"]["python"].startswith(sys.version.split()[0])
        rows = {row["name"]: row for row in found["mechanisms"]}
        for mechanism, (_, said) in TAKEN.items():
            row = rows[MECHANISMS[mechanism]]
            assert (row["state"], said in row["detail"]) == ("fails", True), row

    def test_has_a_name_for_every_mechanism(self) -> None:
        """Names are known without torch, which the mechanisms need."""
        assert list(MECHANISMS) == list(TRIED)

    def test_loads_no_torch(self, run_python) -> None:
        """What asks lives on when torch crashes as it is imported."""
        code = "import sys, lensnet_guard.doctor\nprint('torch' in sys.modules)"
        assert run_python(code).stdout == "False\n"


class TestAttempt:
    def answer(self, name: str, folder: Path) -> dict[str, str]:
        attempt(name, folder)
        return json.loads((folder / ANSWER).read_text())

    def test_no_compiler(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """Where torch.compile fails for an unguarded module too, nothing is said of the guard."""

        def compile_nothing(module: nn.Module, **_: str) -> None:
            def fail(*_: object) -> None:
                raise RuntimeError("\nno C++ compiler\nand much more")

            module._compiled_call_impl = fail

        monkeypatch.setattr(nn.Module, "compile", compile_nothing)
        assert self.answer("compile", tmp_path) == {
            "state": "not tried",
            "detail": "torch.compile does not work here without a guard: RuntimeError: "
            "no C++ compiler",
        }

    def test_no_gloo(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """As in a torch that was built without it."""
        monkeypatch.setattr(torch.distributed, "is_gloo_available", lambda: False)
        detail = "this torch was built without gloo"
        assert self.answer("ranks", tmp_path) == {"state": "not tried", "detail": detail}

    def test_what_the_guard_warns_of(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """Is told beside what was seen; what others warn of is not."""

        class Untested(UserWarning):
            __module__ = "lensnet_guard"

        def warn(_: Path) -> str:
            import warnings

            warnings.warn("a torch of tomorrow", Untested, stacklevel=1)
            warnings.warn("something else", UserWarning, stacklevel=1)
            return "it works"

        monkeypatch.setitem(TRIED, "torch", warn)
        assert self.answer("torch", tmp_path) == {
            "state": "holds",
            "detail": "it works; warned: a torch of tomorrow",
        }


def ends(pid: int, within_s: float = 20) -> bool:
    """Whether a process that has been killed is gone: on a busy machine that takes a while."""
    stat, until = Path(f"/proc/{pid}/stat"), time.monotonic() + within_s
    while time.monotonic() < until:
        try:
            if stat.read_text().split()[2] == "Z":  # nobody has asked for its exit code
                return True
        except (FileNotFoundError, ProcessLookupError):
            return True
        time.sleep(0.05)
    return False


class TestTryAlone:
    """What an attempt's process can do other than answer."""

    @pytest.mark.parametrize(
        ("code", "detail"),
        [
            (
                "print('so far'); raise SystemExit(3)",
                "exit code 3 and no answer; it last said: so far",
            ),
            ("import os; os.kill(os.getpid(), 11)", "SIGSEGV and no answer"),
        ],
    )
    def test_crashes(self, code: str, detail: str) -> None:
        """Its last words are the detail."""
        found = try_alone("it", [sys.executable, "-c", code])
        assert (found.name, found.state) == ("it", "fails")
        assert found.detail == f"its process ended with {detail}"

    def test_hangs(self, tmp_path: Path) -> None:
        """It is ended after its time limit, and so is what it has started."""
        pid = tmp_path / "pid"
        code = (
            "import subprocess, sys, time\n"
            "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)'])\n"
            f"open({str(pid)!r}, 'w').write(str(child.pid))\n"
            "print('waiting', flush=True)\n"
            "time.sleep(600)"
        )
        found = try_alone("it", [sys.executable, "-c", code], limit_s=5)
        assert found.state == "fails"
        assert found.detail == "no answer within 5 s: ended; it last said: waiting"
        assert ends(int(pid.read_text()))

    def test_is_no_rank_of_the_run_that_asks(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """The doctor under torchrun has two ranks of its own."""
        monkeypatch.setenv("WORLD_SIZE", "8")
        code = "import os, sys; sys.exit(os.environ.get('WORLD_SIZE', 0))"
        assert "exit code 0" in try_alone("it", [sys.executable, "-c", code]).detail


class TestRender:
    def test_names_what_does_not_hold(self) -> None:
        """In the last line; what was not tried is no failure."""
        findings = (
            Finding("log", "fails", "[bold]x[/nope]", 1.25),
            Finding("graphs", "not tried", "no GPU", 0.5),
        )
        examination = Examination({"torch": "2.15.0", "peft": None}, findings)
        console = Console(record=True, width=100)
        render(examination, console)
        lines = [line.rstrip() for line in console.export_text().splitlines()]
        assert lines == [
            "torch  2.15.0",
            "peft   not installed",
            "",
            "mechanism  state      seconds  what was seen",
            "log        fails          1.2  [bold]x[/nope]",
            "graphs     not tried      0.5  no GPU",
            "",
            "does not hold: log",
        ]
        assert not examination.holds
