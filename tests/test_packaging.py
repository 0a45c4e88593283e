"""What is published: the files of sdist and wheel, and what an installed wheel gives."""

import re
import subprocess
import sys
import tarfile
import venv
import zipfile
from collections.abc import Callable, Iterable
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from lensnet_guard import __version__
from lensnet_guard._extras import LIBRARIES

ROOT = Path(__file__).parents[1]
Execute = Callable[..., str]


def run(*command: str | Path, cwd: Path, code: int = 0, **environment: str) -> str:
    """Output of a command that ends with this code; no PYTHONPATH hides what is missing."""
    done = subprocess.run(
        command,
        cwd=cwd,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=100,
    )
    assert done.returncode == code, done.stdout
    return done.stdout


def required(texts: Iterable[str], extras: Iterable[str]) -> list[Requirement]:
    """Those of some requirements that hold here, with these extras."""
    found = map(Requirement, texts)
    return [
        r for r in found if not r.marker or any(r.marker.evaluate({"extra": e}) for e in extras)
    ]


def link(requirements: list[Requirement], folder: Path) -> None:
    """Let a folder of packages have what is required, from the environment that runs this."""
    todo, done = [*requirements], set[tuple[str, ...]]()
    while todo:
        requirement = todo.pop()
        distribution = metadata.distribution(requirement.name)
        key = (canonicalize_name(requirement.name), *sorted(requirement.extras))
        if key not in done:
            done.add(key)
            todo += required(distribution.requires or (), ["", *requirement.extras])
            tops = {file.parts[0] for file in distribution.files or ()} - {"..", "__pycache__"}
            for top in tops:
                if not (folder / top).exists():  # several share one, as those of CUDA do
                    (folder / top).symlink_to(str(distribution.locate_file(top)))


@pytest.fixture(scope="module")
def dist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the sdist, and the wheel that was built from it: ``make dist``."""
    folder = tmp_path_factory.mktemp("dist")
    run(sys.executable, "-m", "build", "--no-isolation", "--outdir", folder, ROOT, cwd=folder)
    return folder


@pytest.fixture(scope="module")
def wheel(dist: Path) -> Path:
    (path,) = dist.glob("*.whl")
    return path


@pytest.fixture(scope="module")
def environment(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Execute]:
    """Makes a fresh environment with the wheel and what that requires, and nothing else.

    No network: pip installs the wheel alone, and what it requires are links to what is installed
    here. That nothing is missing is pip's word. What is made runs a command of the environment, in
    an empty folder.
    """

    def make(*others: str, extras: tuple[str, ...] = ()) -> Execute:
        home = tmp_path_factory.mktemp("clean")
        venv.create(home, with_pip=False)
        (own,) = home.glob("lib/python*/site-packages")
        pip = [sys.executable, "-m", "pip", "--python", home / "bin" / "python"]
        # Not seen as an installation to be replaced: that one belongs to another environment.
        alone = ["--no-deps", "--no-index", "--no-compile", "--ignore-installed"]
        run(*pip, "install", "--quiet", *alone, wheel, cwd=home)
        (ours,) = metadata.distributions(name="lensnet-guard", path=[str(own)])
        link([*required(ours.requires or (), ["", *extras]), *map(Requirement, others)], own)
        run(*pip, "check", cwd=home)
        empty = tmp_path_factory.mktemp("empty")

        def execute(program: str, *arguments: str, code: int = 0) -> str:
            return run(home / "bin" / program, *arguments, cwd=empty, code=code, HOME=str(empty))

        return execute

    return make


@pytest.fixture(scope="module")
def installed(environment: Callable[..., Execute]) -> Execute:
    """An environment with both commands, and pytest."""
    return environment("pytest", extras=("megacontext",))


@pytest.fixture(scope="module")
def bare(environment: Callable[..., Execute]) -> Execute:
    """An environment with the guard alone, and pytest."""
    return environment("pytest")


class TestSdist:
    def test_has_every_file_that_is_tracked(self, dist: Path) -> None:
        """So that the tests can be run from it; and nothing of runs or caches."""
        (path,) = dist.glob("*.tar.gz")
        assert path.name == f"lensnet_guard-{__version__}.tar.gz"
        with tarfile.open(path) as archive:
            packed = {name.partition("/")[2] for name in archive.getnames()}
        folders = (".ci", ".github", "benchmarks", "docs", "examples", "src", "tests")
        here = [f for folder in folders for f in (ROOT / folder).rglob("*") if f.is_file()]
        made = ("__pycache__", "wheels")  # the latter by make gpu-wheels
        expected = {str(f.relative_to(ROOT)) for f in here if f.parent.name not in made}
        expected |= {"README.md", "CHANGELOG.md", "LICENSE", "Makefile", "pyproject.toml"}
        expected |= {"conftest.py", "constraints.txt", "mkdocs.yml"}
        expected |= {"CITATION.cff", "CONTRIBUTING.md", "SECURITY.md"}
        assert len(expected) > 100
        assert packed - expected == {"PKG-INFO", ".gitignore"}
        assert expected - packed == set()


class TestWheel:
    def test_has_the_two_packages_and_nothing_else(self, wheel: Path) -> None:
        """Every module, the stubs that name the public names, the markers that both are typed."""
        assert wheel.name == f"lensnet_guard-{__version__}-py3-none-any.whl"
        with zipfile.ZipFile(wheel) as archive:
            packed = set(archive.namelist())
        files = [f for end in ("py", "pyi") for f in (ROOT / "src").rglob(f"*.{end}")]
        code = {str(f.relative_to(ROOT / "src")) for f in files}
        info = f"lensnet_guard-{__version__}.dist-info"
        names = ("METADATA", "RECORD", "WHEEL", "entry_points.txt", "licenses/LICENSE")
        metadata = {f"{info}/{name}" for name in names}
        markers = {"lensnet_guard/py.typed", "megacontext/py.typed"}
        shipped = (ROOT / "src" / "megacontext" / "weights").rglob("*")
        weights = {str(f.relative_to(ROOT / "src")) for f in shipped if f.is_file()}
        assert len(weights) == 5
        assert packed == code | markers | metadata | weights | {"lensnet_guard/mistakes.md"}

    def test_its_metadata(self, wheel: Path) -> None:
        """What an index shows; no address is named, for there is none."""
        with zipfile.ZipFile(wheel) as archive:
            text = archive.read(f"lensnet_guard-{__version__}.dist-info/METADATA").decode()
        headers = text.partition("\n\n")[0].splitlines()
        assert f"Version: {__version__}" in headers
        assert "Requires-Python: >=3.10" in headers
        assert "License-Expression: MIT" in headers
        assert "Classifier: Typing :: Typed" in headers
        assert [line for line in headers if line.startswith(("Project-URL", "Home-page"))] == []


class TestChangelog:
    def test_begins_with_this_version(self) -> None:
        """Whoever raises the version writes what changed."""
        changelog = (ROOT / "CHANGELOG.md").read_text()
        assert re.findall(r"^## (\S+)", changelog, flags=re.MULTILINE)[0] == __version__


class TestCitation:
    def test_is_of_this_version(self) -> None:
        """That its form is right is looked at by ``make check``."""
        citation = (ROOT / "CITATION.cff").read_text()
        assert re.findall(r"^version: (\S+)$", citation, flags=re.MULTILINE) == [__version__]


class TestInstalledWheel:
    def test_is_what_runs(self, installed: Execute) -> None:
        """Not the sources beside these tests; and type checkers see both markers."""
        code = (
            "import importlib.metadata, importlib.resources, lensnet_guard\n"
            "print(lensnet_guard.__file__, importlib.metadata.version('lensnet-guard'))\n"
            "for package in ('lensnet_guard', 'megacontext'):\n"
            "    print(importlib.resources.files(package).joinpath('py.typed').is_file())\n"
        )
        where, *typed = installed("python", "-c", code).splitlines()
        assert "/clean" in where
        assert where.endswith(__version__)
        assert typed == ["True", "True"]

    @pytest.mark.parametrize("program", ["lensnet-guard", "megacontext"])
    def test_gives_both_commands(self, installed: Execute, program: str) -> None:
        """Which tell their version, and what they can do."""
        assert installed(program, "--version") == f"{program}, version {__version__}\n"
        assert f"Usage: {program} [OPTIONS] COMMAND" in installed(program, "--help")

    def test_explains_mistakes(self, installed: Execute) -> None:
        """There is no folder of pages: the catalogue is in the package."""
        page = (ROOT / "docs" / "mistakes.md").read_text()
        names = re.findall(r"^## (\S+)$", page, flags=re.MULTILINE)
        assert len(names) > 10
        listed = installed("lensnet-guard", "explain").splitlines()
        assert [line.split()[0] for line in listed] == names

    def test_gives_the_pytest_plugin(self, installed: Execute) -> None:
        """Found by its entry point."""
        listed = installed("python", "-m", "pytest", "--fixtures")
        assert "assert_lensnet_calls -- " in listed
        assert "/clean" in listed.partition("assert_lensnet_calls -- ")[2].splitlines()[0]


class TestGuardAlone:
    """``pip install lensnet-guard``, where nothing else brings numpy, matplotlib, click or rich."""

    NO_NUMPY = "ignore:Failed to initialize NumPy:UserWarning"  # torch's own, as it is imported

    def test_brings_little(self, bare: Execute) -> None:
        """What megacontext and the commands need is really not there."""
        code = "import importlib.util, sys\nprint([*map(importlib.util.find_spec, sys.argv[1:])])"
        assert bare("python", "-c", code, "numpy", "matplotlib", "rich", "click") == (
            "[None, None, None, None]\n"
        )

    def test_guards(self, bare: Execute) -> None:
        """Every public name is there, the log is written, what is illegal is refused in words."""
        code = (
            "import torch\n"
            "from lensnet_guard import *\n"
            "guard = guard_module(torch.nn.Linear(3, 2), log='run')\n"
            "with guard.context('training'), guard.micro_step(0):\n"
            "    with guard.sanctioned('preference_scorer'):\n"
            "        guard.module(torch.ones(1, 3)).sum().backward()\n"
            "print(guard.log_path.name)\n"
            "with guard.context('training'):\n"
            "    try:\n"
            "        guard.module(torch.ones(1, 3))\n"
            "    except UnsanctionedCall as violation:\n"
            "        print(str(violation).splitlines()[0])\n"
        )
        assert bare("python", "-W", "error", "-W", self.NO_NUMPY, "-c", code) == (
            "lensnet.rank0.jsonl\nLinear was called in training outside its sanctioned scope.\n"
        )

    def test_comparing_ranks_needed_numpy(self, bare: Execute) -> None:
        """As torch's collectives for objects do: the second rank calls once more than the first."""
        code = (
            "import contextlib, os, torch, torch.distributed as dist\n"
            "from lensnet_guard import CallPolicy, RankDivergence, compare_ranks, guard_module\n"
            "rank = 0 if os.fork() else 1\n"
            "store = dist.FileStore('store', 2)\n"
            "dist.init_process_group('gloo', store=store, rank=rank, world_size=2)\n"
            "policy = CallPolicy(scopes={'kl': 1 + rank})\n"
            "guard = guard_module(torch.nn.Linear(3, 2), policy=policy)\n"
            "try:\n"
            "    with guard.context('training'), compare_ranks(guard), guard.micro_step(0):\n"
            "        for _ in range(1 + rank):\n"
            "            with guard.sanctioned('kl'):\n"
            "                guard.module(torch.ones(1, 3))\n"
            "except RankDivergence as divergence:\n"
            "    told = str(divergence)\n"
            "    assert 'rank 0       1 training calls in 1 ' in told, told\n"
            "    assert 'rank 1       2 training calls in ' in told, told\n"
            "    print('told', flush=True)\n"
            "if rank == 0:\n"
            "    os.wait()\n"
        )
        printed = bare("python", "-W", "ignore", "-c", code).splitlines()
        assert printed.count("told") == 2  # beside what the listeners may have said before

    def test_has_the_pytest_plugin(self, bare: Execute) -> None:
        """Found by its entry point; its fixtures, marker, log and summary work."""
        test = (
            "import torch, pytest\n"
            "@pytest.mark.lensnet_calls(exact=1)\n"
            "def test_it(lensnet_guard, assert_lensnet_calls):\n"
            "    guard = lensnet_guard(torch.nn.Linear(3, 2))\n"
            "    with guard.context('inference'), assert_lensnet_calls(n=1):\n"
            "        guard.module(torch.ones(1, 3))\n"
        )
        write = f"from pathlib import Path; Path('test_it.py').write_text({test!r})"
        bare("python", "-c", write)
        warnings = ("-W", "error", "-W", self.NO_NUMPY)
        printed = bare("python", "-m", "pytest", *warnings, "--lensnet-log", "log", "test_it.py")
        assert "\nLensNet: 1 call in 1 test, 0 violations\n" in printed

    @pytest.mark.parametrize(
        ("program", "extra", "code"),
        [("lensnet-guard", "cli", 2), ("megacontext", "megacontext", 3)],
    )
    def test_commands_say_what_to_install(
        self, bare: Execute, program: str, extra: str, code: int
    ) -> None:
        """In one line, whatever they are asked for; as modules too."""
        needed = ", ".join(n for n in LIBRARIES[extra] if n != "filelock")  # torch brings that one
        line = f'{program} needs {needed}: pip install "lensnet-guard[{extra}]"\n'
        assert bare(program, "--help", code=code) == line
        assert bare("python", "-m", program.replace("-", "_"), code=code) == line

    def test_names_of_megacontext_say_what_to_install(self, bare: Execute) -> None:
        """Every one of them that needs it; the package itself is imported lazily."""
        code = (
            "import warnings; warnings.simplefilter('ignore')\n"
            "import megacontext\n"
            "for name in megacontext.__all__:\n"
            "    try: print(getattr(megacontext, name).__name__)\n"
            "    except ModuleNotFoundError as error: print(error)\n"
        )
        lines = bare("python", "-c", code).splitlines()
        assert {line for line in lines if "needs" in line} == {
            "megacontext needs numpy, matplotlib, click, rich: "
            'pip install "lensnet-guard[megacontext]"'
        }

    def test_the_command_line_reads_logs_without_numpy(
        self, environment: Callable[..., Execute]
    ) -> None:
        """With the extra named cli, which is not enough for megacontext."""
        execute = environment(extras=("cli",))
        code = (
            "import torch, lensnet_guard as lg\nlg.guard_module(torch.nn.Linear(3, 2), log='run')"
        )
        execute("python", "-c", code)
        assert execute("lensnet-guard", "postmortem", "run").startswith("verdict: clean")
        assert execute("megacontext", "train", code=3) == (
            'megacontext needs numpy, matplotlib: pip install "lensnet-guard[megacontext]"\n'
        )


class TestExtras:
    @pytest.mark.parametrize("extra", LIBRARIES)
    def test_bring_what_commands_ask_for(self, extra: str, wheel: Path) -> None:
        """A library that is missing is looked for by the name of its distribution."""
        with zipfile.ZipFile(wheel) as archive:
            text = archive.read(f"lensnet_guard-{__version__}.dist-info/METADATA").decode()
        texts = re.findall(r"^Requires-Dist: (.+)$", text, flags=re.MULTILINE)
        always = required(texts, [""])
        brought = [r.name for r in required(texts, [extra]) if str(r) not in map(str, always)]
        assert sorted(brought) == sorted(LIBRARIES[extra])
        assert {r.name for r in always} == {"torch", "wrapt", "structlog", "orjson"}
