"""Two real processes: DDP, FSDP1 and FSDP2 around a guarded module, and a guard around each.

What they train is in two_ranks.py: every wrapper, without checkpointing and with both kinds of it,
guarded and not, with gradients gathered over two micro-steps.
"""

from pathlib import Path

import pytest
from tests.lensnet_guard.plumbing.processes import on_two_ranks
from tests.lensnet_guard.plumbing.two_ranks import (
    ACCUMULATED,
    AROUND,
    GATHERS_FIRST,
    PARTLY,
    STEPS,
    WRAPPERS,
)

SCRIPT = Path(__file__).with_name("two_ranks.py")


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    """What each rank saw, by wrapper and kind of checkpointing: (guarded, unguarded)."""
    folder = tmp_path_factory.mktemp("ranks")
    keys = [(name, kind) for name in (*WRAPPERS, *AROUND) for kind in (None, False, True)]
    return [
        {key: [results[f"{key[0]}, {key[1]}, {on}"] for on in ("guarded", "plain")] for key in keys}
        for results in on_two_ranks(SCRIPT, folder)
    ]


class TestTwoProcesses:
    def test_train_as_they_do_without_a_guard(self, ranks):
        """Losses and final weights, to the last bit, on each rank; both ranks hold one model."""
        for of_rank in ranks:
            for key, (guarded, plain) in of_rank.items():
                assert len(guarded["losses"]) == STEPS * ACCUMULATED
                assert guarded["losses"] == plain["losses"], key
                assert guarded["weights"] == plain["weights"], key
        for key in ranks[0]:
            one, other = (of_rank[key][0]["weights"] for of_rank in ranks)
            shared = [name for name in one if key[0] != PARTLY or name.startswith("blocks")]
            assert [one[name] for name in shared] == [other[name] for name in shared], key
            assert ranks[0][key][0]["losses"] != ranks[1][key][0]["losses"], key

    def test_count_the_same_calls(self, ranks):
        """One a micro-step; what is run again in backward is none."""
        for of_rank in ranks:
            for (name, kind), (guarded, _) in of_rank.items():
                number = STEPS * ACCUMULATED
                assert guarded["calls"] == [number, number], name
                assert guarded["violations"] == 0
                # Inside the critic its parts are run again, and around it the critic is.
                repeats = number if name in AROUND and kind is not None else 0
                assert guarded["recomputed"] == repeats, (name, kind)

    def test_a_planted_call_is_named_with_its_line_on_its_rank(self, ranks):
        """Rank 1 alone is refused; where the wrapper comes first to a collective, both are."""
        for rank, of_rank in enumerate(ranks):
            for (name, kind), (guarded, _) in of_rank.items():
                if name in WRAPPERS and (rank == 1 or name in GATHERS_FIRST):
                    function, file, message = guarded["planted"]
                    assert (function, file) == ("call_again", "two_ranks.py"), (name, kind)
                    assert message.startswith(
                        "critic was called in training outside its sanctioned scope.\n  called from"
                    )
                elif name in WRAPPERS:
                    assert guarded["planted"] is None
