"""A LensNet that looks for the tail's tokens in the blocks."""

import pytest
import torch
from torch import Tensor

from megacontext.model.late_interaction import LateInteractionLensNet
from megacontext.model.matching import NO_TOKEN
from megacontext.preference import make_pairs, preference_loss

B, C, K, Q, D = 3, 6, 4, 5, 16
VOCABULARY = 40


@pytest.fixture(scope="module")
def table() -> Tensor:
    """Token embeddings with a mean, as pretrained models have."""
    return torch.randn(VOCABULARY, D, generator=torch.Generator().manual_seed(1)) + 2


@pytest.fixture
def lensnet(table: Tensor) -> LateInteractionLensNet:
    """Untrained, but none of its layers is without effect."""
    torch.manual_seed(0)
    made = LateInteractionLensNet(D, Q, table.mean(0))
    torch.nn.init.normal_(made.linear.weight, std=0.1)
    return made


def view(table: Tensor, history: Tensor, tail: Tensor) -> dict[str, Tensor]:
    """Make LensNet's arguments of the tokens of blocks ``[B, C, K]`` and of a tail ``[B, Q]``."""
    batch, blocks, size = history.shape
    children, width = table[history], blocks + tail.shape[1]
    lods = (torch.arange(width) < blocks).long().expand(batch, -1)
    starts = torch.cat([torch.arange(blocks), blocks - 1 + torch.arange(1, tail.shape[1] + 1)])
    no_tokens = torch.full((batch, blocks), NO_TOKEN)
    return {
        "embeddings": torch.cat([children.mean(2), table[tail]], dim=1),
        "starts": (starts * size).expand(batch, -1),
        "spans": torch.where(lods > 0, size, 1),
        "lods": lods,
        "pad_mask": None,  # type: ignore[dict-item]  # none is padded
        "tokens": torch.cat([no_tokens, tail], dim=1),
        "children": children,
        "child_tokens": history,
    }


@pytest.fixture
def inputs(table: Tensor) -> dict[str, Tensor]:
    """Of random tokens."""
    generator = torch.Generator().manual_seed(2)
    history = torch.randint(0, VOCABULARY, (B, C, K), generator=generator)
    return view(table, history, torch.randint(0, VOCABULARY, (B, Q), generator=generator))


class TestScores:
    def test_gists_alone_have_scores(
        self, lensnet: LateInteractionLensNet, inputs: dict[str, Tensor]
    ) -> None:
        """Within [-1, 1], and 0 for the tail."""
        scores = lensnet(**inputs)
        assert scores.shape == (B, C + Q)
        assert (scores[:, C:] == 0).all()
        assert (scores[:, :C] != 0).all()
        assert (scores.abs() <= 1).all()

    def test_pads_and_other_samples_change_nothing(
        self, lensnet: LateInteractionLensNet, inputs: dict[str, Tensor]
    ) -> None:
        """Two pads on the left of one sequence, which is read with others or alone."""
        alone = {n: None if v is None else v[:1] for n, v in inputs.items()}
        padded = {n: v if v is None else v.clone() for n, v in inputs.items()}
        pad_mask = torch.zeros(B, C + 2 + Q, dtype=torch.bool)
        pad_mask[:, :2] = True
        for name, value in padded.items():
            if value is not None:
                fill = NO_TOKEN if "tokens" in name else 0
                left = torch.full((B, 2, *value.shape[2:]), fill, dtype=value.dtype)
                padded[name] = torch.cat([left, value], dim=1)
        padded["children"][:, :2] = 7.0  # what pads hold does not matter
        scores = lensnet(**padded | {"pad_mask": pad_mask})
        assert (scores[:, :2] == 0).all()
        torch.testing.assert_close(scores[:1, 2:], lensnet(**alone))

    def test_a_view_that_is_all_query_has_no_scores(
        self, lensnet: LateInteractionLensNet, inputs: dict[str, Tensor]
    ) -> None:
        """There is nothing to expand."""
        short = {n: v if v is None else v[:, C:] for n, v in inputs.items()}
        short["children"] = inputs["children"][:, :0]
        short["child_tokens"] = inputs["child_tokens"][:, :0]
        assert lensnet(**short).tolist() == [[0.0] * Q] * B

    def test_gists_of_gists_are_not_centred(
        self, lensnet: LateInteractionLensNet, inputs: dict[str, Tensor]
    ) -> None:
        """What has no token is a gist, and has no mean to take off: only tokens' changes."""
        none = torch.full_like(inputs["child_tokens"], NO_TOKEN)
        before = lensnet(**inputs | {"child_tokens": none})
        moved = {"children": inputs["children"] - lensnet.centre}
        tokens = lensnet(**inputs | {"child_tokens": none} | moved)
        assert not torch.allclose(before, tokens)
        lensnet.centre += 1
        query = {"embeddings": inputs["embeddings"] + 1}
        torch.testing.assert_close(before, lensnet(**inputs | {"child_tokens": none} | query))

    @pytest.mark.filterwarnings("ignore:Mismatch dtype")
    def test_it_runs_in_bfloat16(
        self, lensnet: LateInteractionLensNet, inputs: dict[str, Tensor]
    ) -> None:
        """Near what it gives in single precision."""
        with torch.autocast("cpu", torch.bfloat16):
            scores = lensnet(**inputs)
        torch.testing.assert_close(scores.float(), lensnet(**inputs), atol=0.05, rtol=0.05)


def task(table: Tensor, seed: int) -> tuple[dict[str, Tensor], Tensor]:
    """One block of each history holds two of the tail's tokens in a row; the others none."""
    generator = torch.Generator().manual_seed(seed)
    history = torch.randint(0, VOCABULARY // 2, (16, C, K), generator=generator)
    upper = VOCABULARY // 2
    tail = torch.randint(upper, VOCABULARY, (16, Q), generator=generator)
    asked = torch.randint(0, C, (16,), generator=generator)
    history[torch.arange(16), asked, 1:3] = tail[:, 1:3]
    return view(table, history, tail), asked


class TestLearning:
    def test_it_finds_what_the_tail_repeats(self, table: Tensor) -> None:
        """By preferences alone, for tokens in places that it has not seen; all weights learn."""
        torch.manual_seed(0)
        lensnet = LateInteractionLensNet(D, Q, table.mean(0))
        optimizer = torch.optim.AdamW(lensnet.parameters(), 3e-3)
        gists = (torch.arange(C + Q) < C).expand(16, -1)
        for step in range(60):
            inputs, asked = task(table, step)
            held = torch.zeros(16, C, C + Q, dtype=torch.bool)
            held[:, range(C), range(C)] = True
            nll = 1.0 - (torch.arange(C) == asked[:, None]).float()
            loss = preference_loss(
                lensnet(**inputs), make_pairs(nll, held, gists), temperature=0.5, advantage_scale=1
            )
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        unmoved = [n for n, p in lensnet.named_parameters() if p.grad is None or not p.grad.any()]
        assert unmoved == []
        with torch.no_grad():
            inputs, asked = task(table, 1_000)
            right = (lensnet(**inputs)[:, :C].argmax(1) == asked).float().mean()
        assert right > 0.9
