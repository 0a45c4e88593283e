"""The names that users import, and what importing the package costs before one of them is used."""

import ast
import importlib
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
    def test_type_checkers_see_the_table(self) -> None:
        """Name by name and module by module; that is what keeps the two in step."""
        tree = ast.parse(Path(megacontext.__file__).read_text())
        imports = (node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom))
        seen = {
            alias.asname: (node.module, alias.name)
            for node in imports
            if (node.module or "").startswith("megacontext.")
            for alias in node.names
        }
        table = {name: (f"megacontext.{at}", name) for name, at in megacontext._HOMES.items()}
        assert seen == table
        assert megacontext.__all__ == sorted(table)

    @pytest.mark.parametrize("name", megacontext.__all__)
    def test_each_is_its_modules_own(self, name: str) -> None:
        """The very object."""
        home = importlib.import_module(f"megacontext.{megacontext._HOMES[name]}")
        assert getattr(megacontext, name) is getattr(home, name)

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
        loaded = loads("-c", "import megacontext.trainer")
        assert "megacontext.distributed" in loaded
        assert loaded.isdisjoint({"torch.distributed.tensor", "torch.distributed.fsdp"})

    def test_the_first_name_loads_what_it_needs(self) -> None:
        """Torch is seen where it is loaded."""
        assert "torch" in loads("-c", "from megacontext import MCController")
