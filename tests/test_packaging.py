"""What is published: the files of sdist and wheel, and what an installed wheel gives."""

import re
import subprocess
import sys
import sysconfig
import tarfile
import venv
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

from lensnet_guard import __version__

ROOT = Path(__file__).parents[1]


def run(*command: str | Path, cwd: Path, **environment: str) -> str:
    """Output of a command that succeeds, without the PYTHONPATH that would hide what is missing."""
    done = subprocess.run(
        command,
        cwd=cwd,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=100,
    )
    assert done.returncode == 0, done.stdout
    return done.stdout


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
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., str]:
    """Runs a command of a fresh environment that has the wheel, in an empty folder.

    No network: what the wheel depends on is seen through a line of a ``.pth`` file, after the
    environment's own packages. Such a line runs no ``.pth`` file of the folder that it names, so
    an editable installation there stays unseen.
    """
    home = tmp_path_factory.mktemp("clean")
    venv.create(home, with_pip=False)
    (own,) = home.glob("lib/python*/site-packages")
    (own / "dependencies.pth").write_text(f"{sysconfig.get_path('purelib')}\n")
    pip = [sys.executable, "-m", "pip", "--python", home / "bin" / "python", "install", "--quiet"]
    # Not seen as an installation to be replaced: that one belongs to another environment.
    run(*pip, "--no-deps", "--no-index", "--no-compile", "--ignore-installed", wheel, cwd=home)
    empty = tmp_path_factory.mktemp("empty")

    def execute(program: str, *arguments: str) -> str:
        return run(home / "bin" / program, *arguments, cwd=empty, HOME=str(empty))

    return execute


class TestSdist:
    def test_has_every_file_that_is_tracked(self, dist: Path) -> None:
        """So that the tests can be run from it; and nothing of runs or caches."""
        (path,) = dist.glob("*.tar.gz")
        assert path.name == f"lensnet_guard-{__version__}.tar.gz"
        with tarfile.open(path) as archive:
            packed = {name.partition("/")[2] for name in archive.getnames()}
        folders = (".ci", "benchmarks", "docs", "examples", "src", "tests")
        here = [f for folder in folders for f in (ROOT / folder).rglob("*") if f.is_file()]
        made = ("__pycache__", "wheels")  # the latter by make gpu-wheels
        expected = {str(f.relative_to(ROOT)) for f in here if f.parent.name not in made}
        expected |= {"README.md", "CHANGELOG.md", "LICENSE", "Makefile", "pyproject.toml"}
        expected |= {"conftest.py", "constraints.txt", "mkdocs.yml"}
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
        assert packed == code | markers | metadata

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


class TestInstalledWheel:
    def test_is_what_runs(self, installed: Callable[..., str]) -> None:
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
    def test_gives_both_commands(self, installed: Callable[..., str], program: str) -> None:
        """Which tell their version, and what they can do."""
        assert installed(program, "--version") == f"{program}, version {__version__}\n"
        assert f"Usage: {program} [OPTIONS] COMMAND" in installed(program, "--help")

    def test_gives_the_pytest_plugin(self, installed: Callable[..., str]) -> None:
        """Found by its entry point."""
        listed = installed("python", "-m", "pytest", "--fixtures")
        assert "assert_lensnet_calls -- " in listed
        assert "/clean" in listed.partition("assert_lensnet_calls -- ")[2].splitlines()[0]
