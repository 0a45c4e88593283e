"""How weights move: who has gradients in a phase, and who is left alone."""

import pytest
import torch
from torch import nn

from megacontext.training.optimization import new_optimizer, rate_at, train_alone, update


class TestTrainAlone:
    def test_gradients_are_of_what_is_trained_alone(self) -> None:
        """Its buffers are kept, with what is in them; those of all others are taken away."""
        first, second, third = (nn.Parameter(torch.ones(2)) for _ in range(3))
        first.grad, second.grad = torch.full((2,), 3.0), torch.full((2,), 4.0)
        buffer = first.grad
        train_alone([first, second, third], iter([first, third]))
        assert first.grad is buffer
        assert first.grad.tolist() == [3.0, 3.0]
        assert second.grad is None
        assert third.grad is not None
        assert third.grad.tolist() == [0.0, 0.0]

    def test_what_is_left_alone_does_not_move(self) -> None:
        """Bit for bit, whatever momentum it has: neither by that nor by the decay."""
        first, second = (nn.Parameter(torch.full((2,), 2.0)) for _ in range(2))
        optimizer = new_optimizer([([first, second], 0.1)])
        (first + second).sum().backward()
        update(optimizer, rate=1.0, clip_norm=1.0)
        before = [first.detach().clone(), second.detach().clone()]
        train_alone([first, second], [second])
        for _ in range(3):
            second.sum().backward()
            update(optimizer, rate=1.0, clip_norm=1.0)
        assert first.equal(before[0])
        assert not second.equal(before[1])


def test_rates_of_a_phase() -> None:
    """Up in the warm-up, then down to a tenth."""
    assert [rate_at(step, 12, 2) for step in (0, 1, 2)] == [0.5, 1.0, 1.0]
    assert rate_at(12, 12, 2) == pytest.approx(0.1)
