"""Where modules are now that pickles and saved checkpoints of earlier versions name.

What is pickled by today's names is found as ever; a name of before is looked up in a short table,
and only where the import would fail without it.
"""

import sys
from importlib import import_module
from importlib.machinery import ModuleSpec
from types import ModuleType

_NOW = {  # of what a pickle may hold; version 0.1.0 and before
    "armed_class": "boundary.armed_class",
    "budget": "calls.budget",
    "compiled": "calls.compiled",
    "copies": "guard",
    "errors": "calls.errors",
    "hazards": "boundary.hazards",
    "policy": "calls.policy",
    "proxy": "guard",
    "record": "calls.record",
}


class _Finder:
    """Finds a module by its old name, and gives it out as it is."""

    @classmethod
    def find_spec(cls, name: str, _: object, __: object = None) -> ModuleSpec | None:
        package, _, old = name.rpartition(".")
        if package != __package__ or old not in _NOW:
            return None
        return ModuleSpec(name, cls())  # type: ignore[arg-type]  # for typing is slow to import

    def create_module(self, _: ModuleSpec) -> None:
        """An ordinary one, which is not kept."""

    def exec_module(self, module: ModuleType) -> None:
        name = module.__name__
        sys.modules[name] = import_module(f"{__package__}.{_NOW[name.rpartition('.')[2]]}")


def find_moved_modules() -> None:
    """From now on, what pickles of before name is found by the names that it had."""
    sys.meta_path.append(_Finder)
