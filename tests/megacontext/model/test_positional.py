"""Gaussian RoPE."""

import math

import torch

from megacontext.model.positional import gaussian_rope, rotate


def rope(
    starts: list[int], spans: list[int], head_dim: int = 8, rotated_dim: int | None = None
) -> torch.Tensor:
    return gaussian_rope(torch.tensor([starts]), torch.tensor([spans]), head_dim, rotated_dim)


class TestGaussianRope:
    def test_a_token_is_rotated_by_its_position(self) -> None:
        """Span 1 has no variance: plain RoPE."""
        cos, sin = rope([0, 5], [1, 1])
        angles = 5.0 * 10_000.0 ** -(torch.arange(0, 8, 2) / 8)
        torch.testing.assert_close(cos[0, 0, 1], angles.cos())
        torch.testing.assert_close(sin[0, 0, 1], angles.sin())
        assert cos[0, 0, 0].tolist() == [1.0] * 4

    def test_a_span_is_close_to_the_mean_rotation_of_its_tokens(self) -> None:
        """Where the frequency does not turn around inside the span, the normal is a good fit."""
        cos, sin = rope([16], [4], head_dim=16)
        tokens_cos, tokens_sin = rope([16, 17, 18, 19], [1] * 4, head_dim=16)
        torch.testing.assert_close(cos[0, 0, 0], tokens_cos[0, 0].mean(0), atol=0.06, rtol=0)
        torch.testing.assert_close(sin[0, 0, 0], tokens_sin[0, 0].mean(0), atol=0.06, rtol=0)

    def test_fast_frequencies_are_damped_by_the_span(self) -> None:
        """By exp(-ω² σ² / 2), with the variance (s² - 1) / 12 of s consecutive integers."""
        cos, sin = rope([0], [8])
        length = (cos.square() + sin.square()).sqrt()[0, 0, 0]
        assert math.isclose(length[0], math.exp(-0.5 * 63 / 12), rel_tol=1e-5)
        assert (length.diff() > 0).all()

    def test_attention_depends_on_distance_only(self) -> None:
        """Shifting query and key alike changes no product."""
        query, key = torch.randn(2, 1, 1, 1, 8)
        near = rotate(query, rope([9], [1])) @ rotate(key, rope([4], [4])).transpose(-1, -2)
        far = rotate(query, rope([1009], [1])) @ rotate(key, rope([1004], [4])).transpose(-1, -2)
        torch.testing.assert_close(near, far, atol=1e-3, rtol=1e-3)

    def test_twenty_million_tokens_on_neighbours_had_one_angle(self) -> None:
        """Float32 has no odd integers there; differences are as near the beginning."""
        far, near = 20_000_003, 3
        for spans in ([1, 1, 1], [1, 8, 4_096]):
            starts = torch.tensor([0, 1, 9])
            turned = [
                rotate(torch.ones(1, 1, 3, 8), rope((starts + at).tolist(), spans))[0, 0]
                for at in (near, far)
            ]
            products = [x @ x.T for x in turned]
            torch.testing.assert_close(*products, atol=0.02, rtol=0)

    def test_positions_of_training_have_the_angles_that_they_had(self) -> None:
        """Bit by bit: below 4,096 tokens nothing is taken off."""
        starts = torch.arange(4_096)[None]
        cos, _ = gaussian_rope(starts, torch.ones_like(starts), 8)
        angles = starts[..., None].float() * 10_000.0 ** -(torch.arange(0, 8, 2) / 8)
        assert torch.equal(cos[:, 0], angles.cos())

    def test_a_part_of_the_features(self) -> None:
        """The rest compares content wherever it stands, and no span damps it."""
        cos, sin = rope([7, 90], [1, 8], head_dim=8, rotated_dim=4)
        whole = rope([7, 90], [1, 8], head_dim=4)
        torch.testing.assert_close(torch.stack([cos, sin])[..., :2], whole)
        assert cos[..., 2:].eq(1).all()
        assert sin[..., 2:].eq(0).all()
