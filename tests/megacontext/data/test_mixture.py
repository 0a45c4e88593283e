"""A mixture: shares of several sources, one sequence of one of them after another."""

import numpy as np
import pytest
import torch

from megacontext.data.documents import Documents
from megacontext.data.mixture import MixedSource, token_counts
from megacontext.data.recall import RecallSource
from megacontext.data.source import Batch
from megacontext.data.tokenizer import ByteTokenizer
from megacontext.data.windows import WindowSource

FILES = [np.full(300, 200 + i, dtype=np.uint8) for i in range(4)]
WINDOWS = WindowSource(
    Documents(tuple(FILES[:2]), tuple(FILES[2:]), "hash", ByteTokenizer()), 16, 8
)
RECALL = RecallSource(questions=2)
THREE = RecallSource(keys=8)  # asks for one fact more
MIXED = MixedSource(
    {"files": WINDOWS, "recall": RECALL, "three": THREE},
    {"files": 0.5, "recall": 0.3, "three": 0.2},
)
LENGTH = 144


def draw(number: int = 0, size: int = 12) -> Batch:
    return MIXED.batch(np.random.default_rng(number), size, LENGTH)


def is_of_files(batch: Batch) -> torch.Tensor:
    return batch.tokens[:, 0] >= 200


class TestBatch:
    def test_sources_have_their_shares(self) -> None:
        """Of many sequences, to within sampling error; a batch of one is of one of them."""
        many = draw(size=2_000)
        assert many.asked_blocks is not None
        asked = (many.asked_blocks >= 0).sum(axis=1)
        shares = np.bincount(asked, minlength=4) / 2_000
        assert shares == pytest.approx([0.5, 0, 0.3, 0.2], abs=0.03)
        assert {bool(is_of_files(draw(seed, 1))) for seed in range(20)} == {False, True}

    def test_sequences_stand_as_their_sources_were_drawn(self) -> None:
        """And not one source after another."""
        rng = np.random.default_rng(5)
        drawn = rng.choice(3, size=64, p=[0.5, 0.3, 0.2])
        batch = draw(5, 64)
        assert is_of_files(batch).tolist() == (drawn == 0).tolist()
        assert batch.asked_blocks is not None
        asked = (batch.asked_blocks >= 0).sum(axis=1)
        assert asked.tolist() == [(0, 2, 3)[number] for number in drawn]

    def test_what_is_known_of_a_sequence_stays_with_it(self) -> None:
        """The blocks of facts hold the keys asked for, and the answers alone are labelled."""
        batch = draw(size=40)
        assert batch.asked_blocks is not None
        assert batch.labelled is not None
        assert len(batch.tokens) == len(batch.asked_blocks) == len(batch.labelled) == 40
        for tokens, blocks, labelled in zip(
            batch.tokens.tolist(), batch.asked_blocks, batch.labelled, strict=True
        ):
            asked = [int(block) for block in blocks if block >= 0]
            if not asked:  # a window
                assert labelled.all()
                assert len(set(tokens)) == 1
                continue
            assert labelled.sum() == len(asked)
            keys = tokens[-2 * len(asked) :: 2]
            for block, key in zip(asked, keys, strict=True):
                assert key in tokens[8 * block : 8 * block + 8]

    def test_a_sequence_of_a_file_says_which(self) -> None:
        """Lest an evaluation takes those of one file for independent; others are of none."""
        batch = draw(5, 64)
        assert batch.files is not None
        of_files = is_of_files(batch).numpy()
        assert (batch.files[of_files] == batch.tokens[of_files, 0].numpy() - 200).all()
        assert (batch.files[~of_files] == -1).all()
        facts = MixedSource({"recall": RECALL}, {"recall": 1.0})
        assert facts.batch(np.random.default_rng(0), 4, LENGTH).files is None

    def test_without_facts_no_block_is_asked_for(self) -> None:
        """Where no source has any; all tokens are labelled then."""
        batch = MixedSource({"files": WINDOWS}, {"files": 1.0}).batch(
            np.random.default_rng(0), 3, LENGTH
        )
        assert batch.asked_blocks is None
        assert batch.labelled is not None
        assert batch.labelled.all()

    def test_it_is_seeded(self) -> None:
        """Same numbers, same sequences; others, others."""
        first, again, other = draw(1), draw(1), draw(2)
        assert first.tokens.equal(again.tokens)
        assert np.array_equal(first.asked_blocks, again.asked_blocks)  # type: ignore[arg-type]
        assert not first.tokens.equal(other.tokens)

    def test_what_is_held_out_is_in_no_other_batch(self) -> None:
        """Windows are of the held-out files; the language model alone reads those of training."""
        made = {
            name: getattr(MIXED, name)(np.random.default_rng(0), 30, LENGTH)
            for name in ("batch", "held_out_batch")
        }
        made["lm_batch"] = MixedSource({"files": WINDOWS}, {"files": 1.0}).lm_batch(
            np.random.default_rng(0), 30, LENGTH
        )
        files = {name: set(b.tokens[is_of_files(b), 0].tolist()) for name, b in made.items()}
        trained = {200, 201}
        assert files == {"batch": trained, "lm_batch": trained, "held_out_batch": {202, 203}}


class TestDescription:
    def test_what_it_says_of_itself(self) -> None:
        """Each source by its name, and the hash of the files that a resumed run compares."""
        assert MIXED.description["sha256"] == "hash"
        assert MIXED.description["shares"] == MIXED.shares
        assert MIXED.description["recall"] == RECALL.description
        only = MixedSource({"recall": RECALL}, {"recall": 1.0})
        assert "sha256" not in only.description

    def test_sizes(self) -> None:
        """Tokens are below the largest vocabulary; entropies are mixed as sequences are."""
        assert MIXED.vocab_size == 256
        assert MIXED.tokenizer is WINDOWS.tokenizer
        assert MIXED.unigram_entropy() == pytest.approx(0.5 * np.log(2) + 0.5 * np.log(32))


class TestTokenCounts:
    def test_of_the_files_to_train_on(self) -> None:
        """Of a mixture, of its first source that has files; of facts alone there are none."""
        counts = token_counts(MixedSource({"recall": RECALL, "files": WINDOWS}, {}))
        assert counts is not None
        assert np.array_equal(counts, np.bincount([200, 201], minlength=256) * 300)
        assert token_counts(RECALL) is None
        assert token_counts(MixedSource({"recall": RECALL}, {"recall": 1.0})) is None
