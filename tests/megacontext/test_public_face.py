"""The names that users import, and what importing the package costs before one of them is used."""

import ast
import importlib
import re
import subprocess
import sys
from pathlib import Path

import pytest

import megacontext


def loads(*arguments: str) -> set[str]:
    """The modules that a new Python process imports, as Python itself tells."""
    command = [sys.executable, "-X", "importtime", *arguments]
    told = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    return {line.rpartition("|")[2].strip() for line in told.splitlines()}


class TestNames:
    def test_what_the_docs_have_users_import(self) -> None:
        """Nobody has to know which module a name lives in."""
        assert {
            *("train", "TrainConfig", "TrainResult", "MetricSink"),
            *("load_model", "language_model_sizes", "MCConfig", "MCController", "SessionConfig"),
        } <= {*megacontext.__all__}
        docs = Path(__file__).parents[2] / "docs"
        pages = [page.read_text() for page in docs.rglob("*.md")]
        assert not [line for page in pages for line in re.findall(r"from megacontext\..*", page)]

    @pytest.mark.parametrize("name", megacontext.__all__)
    def test_each_is_its_modules_own(self, name: str) -> None:
        """The very object, from the module that the stub names."""
        stub = ast.parse(Path(megacontext.__file__).with_suffix(".pyi").read_text())
        (home,) = (
            line.module
            for line in stub.body
            if isinstance(line, ast.ImportFrom) and line.names[0].name == name
        )
        value = getattr(importlib.import_module(str(home)), name)
        assert getattr(megacontext, name) is value
        assert value.__module__ == home

    def test_a_star_import_brings_all_of_them(self) -> None:
        """And nothing else."""
        namespace: dict[str, object] = {}
        exec("from megacontext import *", namespace)
        assert sorted(namespace.keys() - {"__builtins__"}) == megacontext.__all__

    def test_dir_lists_them_before_they_are_used(self) -> None:
        """In a process that has used none."""
        code = "import megacontext; assert {*megacontext.__all__} <= {*dir(megacontext)}"
        assert "megacontext.controller" not in loads("-c", code)

    def test_a_name_that_does_not_exist(self) -> None:
        """Fails as anywhere else."""
        with pytest.raises(AttributeError) as raised:
            megacontext.Nope  # noqa: B018
        assert str(raised.value) == "module 'megacontext' has no attribute 'Nope'"
        with pytest.raises(ImportError, match="cannot import name 'Nope' from 'megacontext'"):
            exec("from megacontext import Nope")


class TestStartUp:
    @pytest.mark.parametrize(
        "arguments",
        [("-c", "import megacontext"), ("-m", "megacontext", "--help")],
        ids=["import megacontext", "megacontext --help"],
    )
    def test_nothing_large_is_loaded(self, arguments: tuple[str, ...]) -> None:
        """Torch alone takes more than a second, at every --help."""
        loaded = loads(*arguments)
        assert "megacontext" in loaded
        assert loaded.isdisjoint({"torch", "numpy", "matplotlib", "rich"})

    def test_training_alone_loads_nothing_of_sharding(self) -> None:
        """It takes half a second, which ``megacontext train --help`` would take too."""
        loaded = loads("-c", "import megacontext.training.run")
        assert "megacontext.training.distributed" in loaded
        assert loaded.isdisjoint({"torch.distributed.tensor", "torch.distributed.fsdp"})

    def test_the_first_name_loads_what_it_needs(self) -> None:
        """Torch is seen where it is loaded."""
        assert "torch" in loads("-c", "from megacontext import MCController")
