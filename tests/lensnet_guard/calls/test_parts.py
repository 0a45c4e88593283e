"""The quick walk through a module's parts."""

import pytest
from torch import nn

from lensnet_guard.calls.parts import every_part, first_named


@pytest.fixture
def module():
    module = nn.Sequential(nn.Linear(1, 1), nn.Sequential(nn.ReLU(), nn.ModuleList()))
    module.register_module("nothing", None)
    return module


class TestEveryPart:
    def test_is_what_torch_finds(self, module):
        """Also empty containers; and no part where there is None."""
        assert set(every_part(module)) == set(module.modules())
        assert every_part(module)[0] is module
        assert len(every_part(module)) == 5

    def test_a_part_in_two_places(self, module):
        """Comes with all that is in it, each time."""
        module.append(module[1])
        assert len(every_part(module)) == 8
        assert set(every_part(module)) == set(module.modules())


class TestFirstNamed:
    def test_is_the_first_by_place(self, module):
        """And not the first that is given."""
        assert first_named(module, [module[1][0], module[0]]) == "0 (Linear)"
        assert first_named(module, [module[1][0]]) == "1.0 (ReLU)"

    def test_the_module_itself(self, module):
        """Has no path."""
        assert first_named(module, [module[0], module]) == "the module itself (Sequential)"
