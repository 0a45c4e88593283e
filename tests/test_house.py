"""The house's limits: how long a module, a function, a class, a page may be; what a folder says."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
MODULES = sorted((ROOT / "src").rglob("*.py"))
TESTS = sorted((ROOT / "tests").rglob("*.py"))
FOLDERS = sorted({path.parent for path in MODULES})
MODULE_LINES, CLASS_LINES, FUNCTION_LINES, TEST_FILE_LINES, README_LINES = 400, 250, 60, 600, 160
EXCUSE = "Longer than "  # begins the sentence of a docstring that says why


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def lines_of(path: Path) -> int:
    return len(path.read_text().splitlines())


def excused(node: ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) -> bool:
    """Whether a docstring says why what it stands in is so long."""
    return EXCUSE in (ast.get_docstring(node) or "")


def too_long(tree: ast.Module) -> list[str]:
    """The classes and functions of a module above their limits, whole spans, without an excuse."""
    found = []
    for node in ast.walk(tree):
        if isinstance(node, (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            most = CLASS_LINES if isinstance(node, ast.ClassDef) else FUNCTION_LINES
            begin = min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)])
            span = (node.end_lineno or begin) - begin + 1
            if span > most and not excused(node):
                found.append(f"{node.name}: {span} lines, {most} at most")
    return found


class TestSources:
    @pytest.mark.parametrize("path", MODULES, ids=name_of)
    def test_modules_are_short(self, path: Path) -> None:
        """Or their docstring says why they are not."""
        assert lines_of(path) <= MODULE_LINES or excused(ast.parse(path.read_text()))

    @pytest.mark.parametrize("path", MODULES, ids=name_of)
    def test_functions_and_classes_are_short(self, path: Path) -> None:
        """Or the docstring of each that is not says why."""
        assert too_long(ast.parse(path.read_text())) == []

    @pytest.mark.parametrize("folder", FOLDERS, ids=name_of)
    def test_folders_say_what_is_in_them(self, folder: Path) -> None:
        """In the first line of their ``__init__``, which is a whole one."""
        tree = ast.parse((folder / "__init__.py").read_text())
        line = (ast.get_docstring(tree) or "").partition("\n")[0]
        assert len(line.split()) >= 4
        assert line.endswith((".", "?"))


class TestRest:
    @pytest.mark.parametrize("path", TESTS, ids=name_of)
    def test_files_of_tests_are_short(self, path: Path) -> None:
        """Longer ones are split along their classes."""
        assert lines_of(path) <= TEST_FILE_LINES

    def test_the_readme_is_short(self) -> None:
        """What does not fit has a page in docs/."""
        assert lines_of(ROOT / "README.md") <= README_LINES


class TestLimits:
    LONG = "    pass\n" * 70

    def test_what_is_too_long_is_found(self) -> None:
        """Functions inside classes and functions too, with their decorators."""
        tree = ast.parse(f"class A:\n  @property\n  def f(self):\n{self.LONG}")
        assert too_long(tree) == ["f: 72 lines, 60 at most"]

    def test_a_reason_is_an_excuse(self) -> None:
        """For what has it, and for nothing in or around it."""
        reason = '    """Do it.\n\n    Longer than others, because it is a table.\n    """\n'
        assert too_long(ast.parse(f"def f():\n{reason}{self.LONG}")) == []
        inner = reason.replace("    ", "      ")
        tree = ast.parse(f"def f():\n    def g():\n{inner}      pass\n{self.LONG}")
        assert too_long(tree) == ["f: 77 lines, 60 at most"]
