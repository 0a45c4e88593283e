"""The names that other work relies on."""

import importlib
import inspect
import zipfile
from pathlib import Path

import pytest

import lensnet_guard

PROMISED = [
    *("lensnet_guard", "guard_module", "CallPolicy", "Guard", "CallRecord", "LensNetViolation"),
    *("UnsanctionedCall", "BudgetExceeded", "BudgetUnmet", "NoContext", "ReentrantCall"),
    *("BypassedGuard", "ContextSwitchRefused"),
]


class TestPublicFace:
    @pytest.mark.parametrize("name", PROMISED)
    def test_promised_names_are_exported(self, name):
        """Every name of the issue's import list can be imported and is listed in __all__."""
        assert hasattr(lensnet_guard, name)
        assert name in lensnet_guard.__all__

    def test_all_is_complete_and_sorted(self):
        """__all__ names existing things only, each once, in order."""
        assert all(hasattr(lensnet_guard, name) for name in lensnet_guard.__all__)
        assert lensnet_guard.__all__ == sorted(set(lensnet_guard.__all__))

    def test_star_import_gives_the_function_not_the_package(self):
        """`from lensnet_guard import lensnet_guard` is the context manager."""
        namespace = {}
        exec("from lensnet_guard import *", namespace)
        assert inspect.isfunction(namespace["lensnet_guard"])

    def test_an_archive_has_it_too(self, run_python, tmp_path):
        """A package that lies in a zip file has no stub in the file system."""
        package = Path(lensnet_guard.__file__).parent
        archive = tmp_path / "packed.zip"
        with zipfile.ZipFile(archive, "w") as packed:
            for path in package.rglob("*.py*"):
                if path.suffix != ".pyc":
                    packed.write(path, path.relative_to(package.parent))
        code = (
            f"import sys; sys.path.insert(0, {str(archive)!r})\n"
            "import lensnet_guard\n"
            "print(lensnet_guard.__file__, lensnet_guard.NoContext.__name__)"
        )
        assert run_python(code).stdout == f"{archive}/lensnet_guard/__init__.py NoContext\n"

    @pytest.mark.parametrize("name", ["mode", "name", "policy"])
    def test_a_contract_is_not_changed_while_it_holds(self, guard, name):
        """An assignment that changed what a guard says, and not what it does, is refused."""
        with pytest.raises(AttributeError):
            setattr(guard, name, "observe")

    def test_signatures(self):
        """The two ways to put a guard on take exactly the promised keyword arguments."""
        keywords = inspect.Parameter.KEYWORD_ONLY
        expected = {
            "lensnet_guard": ("owner_or_module", ["attribute", "policy", "mode", "log"]),
            "guard_module": ("module", ["policy", "mode", "log", "name", "guard_copies"]),
        }
        for name, (first, rest) in expected.items():
            parameters = inspect.signature(getattr(lensnet_guard, name)).parameters
            assert list(parameters) == [first, *rest]
            assert all(parameters[n].kind is keywords for n in rest)
        parameters = inspect.signature(lensnet_guard.lensnet_guard).parameters
        assert parameters["attribute"].default == "lensnet"

    @pytest.mark.parametrize(
        "name",
        ["module", "context", "micro_step", "sanctioned", "calls", "violations", "count", "carry"],
    )
    def test_a_guard_has_the_promised_members(self, guard, name):
        """Every member of the issue's list exists on a guard."""
        assert hasattr(guard, name)

    def test_every_violation_is_a_lensnet_violation(self):
        """One except clause catches them all, and no violation is a ValueError or the like."""
        for name in PROMISED[6:]:
            assert getattr(lensnet_guard, name).__mro__[1:3] == (
                lensnet_guard.LensNetViolation,
                Exception,
            )

    def test_version_is_the_distribution_version(self):
        """__version__ and the installed metadata agree."""
        version = importlib.import_module("importlib.metadata").version
        assert lensnet_guard.__version__ == version("lensnet-guard")

    def test_using_every_name_loads_no_log_library(self, run_python):
        """structlog brings rich, and both take longer than the guard: the first log loads them."""
        code = """
            import sys
            from lensnet_guard import *
            print({"structlog", "rich", "matplotlib", "torch._dynamo"} & {*sys.modules})
            guard_module(__import__("torch").nn.Linear(3, 2), log="log")
            print("structlog" in sys.modules)
        """
        assert run_python(code).stdout == "set()\nTrue\n"

    def test_a_name_that_is_not_in_the_stub(self):
        """It is missing, as from any module; and what is there can be listed."""
        with pytest.raises(
            AttributeError, match="module 'lensnet_guard' has no attribute 'nothing'"
        ):
            lensnet_guard.nothing  # noqa: B018
        assert {*lensnet_guard.__all__, "__doc__"} <= {*dir(lensnet_guard)}
