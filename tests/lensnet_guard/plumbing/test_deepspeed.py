"""DeepSpeed's ZeRO-2 and ZeRO-3 on two CPU processes: guarded modules in an engine and beside."""

import importlib.util
from pathlib import Path

import pytest
from tests.lensnet_guard.plumbing.processes import on_two_ranks
from tests.lensnet_guard.plumbing.two_ranks_zero import (
    ACCUMULATED,
    AROUND,
    STAGES,
    STEPS,
    WRAPPERS,
)

SCRIPT = Path(__file__).with_name("two_ranks_zero.py")
pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("deepspeed") is None, reason="DeepSpeed is not installed"
)


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    """What each rank saw."""
    folder = tmp_path_factory.mktemp("ranks")
    address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}  # asked for, and never used
    return on_two_ranks(SCRIPT, folder, DS_ACCELERATOR="cpu", **address)


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("name", WRAPPERS)
class TestZero:
    def test_trains_as_without_a_guard(self, ranks, name, stage):
        """Losses and weights, to the last bit; one call of each module in a micro-step."""
        for of_rank in ranks:
            guarded, plain = (of_rank[f"{name}, {stage}, {on}"] for on in ("guarded", "plain"))
            assert len(guarded["losses"]) == STEPS * ACCUMULATED
            assert guarded["losses"] == plain["losses"]
            assert guarded["weights"] == plain["weights"]
            assert guarded["calls"] == [STEPS * ACCUMULATED] * 2
            # The planted one; the reference beside the engine is frozen, down to its bits.
            assert guarded["violations"] == [int(name != AROUND), 0]
        weights = [of_rank[f"{name}, {stage}, guarded"]["weights"] for of_rank in ranks]
        assert weights[0] == weights[1]

    def test_a_planted_call_is_named_with_the_line_that_calls_the_engine(self, ranks, name, stage):
        """And not with the engine's own, which hands it on."""
        if name == AROUND:
            pytest.skip("none is planted there")
        for of_rank in ranks:
            rows = of_rank[f"{name}, {stage}, guarded"]["planted"].splitlines()
            assert rows[0] == "critic was called in training outside its sanctioned scope."
            assert rows[1].startswith("  called from  ")
            assert "two_ranks_zero.py:" in rows[1]
            assert rows[1].endswith(" in call_again")
