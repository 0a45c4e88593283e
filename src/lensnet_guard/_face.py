"""The face of a package: its public names, each written once, in the stub beside ``__init__.py``.

Type checkers and documentation read the stub as it is. At run time a name is imported from the
module that the stub names when somebody first asks for it, so that a package is imported in no
time, whatever its names need.
"""

import ast
import sys
from collections.abc import Callable
from importlib import import_module

from lensnet_guard._extras import require


def attach(
    package: str, file: str, *, extra: str | None = None
) -> tuple[Callable[[str], object], Callable[[], list[str]], list[str]]:
    """Return what makes a package give out the names of its stub.

    Args:
        package: The package's ``__name__``.
        file: Its ``__file__``. The stub beside it holds a docstring, and lines such as
            ``from lensnet_guard.guard import Guard as Guard``.
        extra: What of the installation the names need. Where a library of it is missing, whoever
            asks for a name is told what to install.

    Returns:
        The package's ``__getattr__``, ``__dir__`` and ``__all__``.
    """
    loader = sys.modules[package].__loader__  # which reads from an archive too
    stub = loader.get_data(f"{file.rpartition('.')[0]}.pyi")  # type: ignore[union-attr]
    body = ast.parse(stub).body
    homes = {
        alias.name: str(line.module)
        for line in body
        if isinstance(line, ast.ImportFrom)
        for alias in line.names
    }

    def get(name: str) -> object:
        if name not in homes:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        try:
            home = import_module(homes[name])
        except ModuleNotFoundError:
            if extra is not None:
                require(extra, package)
            raise
        value = getattr(home, name)
        setattr(import_module(package), name, value)
        return value

    def names() -> list[str]:
        return sorted({*vars(import_module(package)), *homes})

    return get, names, sorted(homes)
