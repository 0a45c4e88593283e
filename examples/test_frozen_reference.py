"""A call contract in a project that has nothing to do with LensNet: run me with pytest.

Preference optimisation (DPO, arXiv 2305.18290, equation 7) trains a policy against a frozen
reference model, which must be called exactly once per step, with both answers in one batch. Called
twice, it costs a forward pass that nobody sees; called never, because somebody cached its answer,
the loss is against the wrong numbers. Neither shows in the loss curve.
"""

import contextlib
import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lensnet_guard import BudgetUnmet, CallPolicy, UnsanctionedCall, guard_module

# The project ---------------------------------------------------------------------------------


class TinyLM(nn.Module):
    """Next-token logits of a bigram model: small, but a real language model."""

    def __init__(self, vocab: int = 32, width: int = 16) -> None:
        super().__init__()
        self.embed = nn.Embedding(vocab, width)
        self.head = nn.Linear(width, vocab)

    def forward(self, tokens: Tensor) -> Tensor:
        """``[B, T]`` tokens to ``[B, T, vocab]`` logits."""
        return self.head(self.embed(tokens))


def log_probability(logits: Tensor, tokens: Tensor) -> Tensor:
    """Summed log-probability ``[B]`` of each answer."""
    picked = F.log_softmax(logits[:, :-1], -1).gather(-1, tokens[:, 1:, None])
    return picked.squeeze(-1).sum(-1)


class Trainer:
    """Preference optimisation with the contract: the reference once per step, and only there."""

    def __init__(self, policy: nn.Module) -> None:
        self.policy = policy
        frozen = copy.deepcopy(policy).requires_grad_(False)
        self.guard = guard_module(frozen, policy=CallPolicy({"reference": 1}), name="reference")
        self.reference = self.guard.module
        self.optimizer = torch.optim.AdamW(policy.parameters(), lr=1e-2)

    def step(self, number: int, chosen: Tensor, rejected: Tensor) -> float:
        """One optimizer step on a batch of pairs; gives back the loss."""
        with self.guard.context("training"), self.guard.micro_step(number):
            both = torch.cat([chosen, rejected])
            ours = log_probability(self.policy(both), both)
            theirs = self.reference_log_probability(both)
            margin = (ours - theirs).unflatten(0, (2, -1))
            loss = -F.logsigmoid(0.1 * (margin[0] - margin[1])).mean()
            self.optimizer.zero_grad()
            loss.backward()
            self.optimizer.step()
        return loss.item()

    def reference_log_probability(self, tokens: Tensor) -> Tensor:
        """The one sanctioned call."""
        with torch.no_grad(), self.guard.sanctioned("reference"):
            return log_probability(self.reference(tokens), tokens)


# Its tests -----------------------------------------------------------------------------------


@pytest.fixture
def trainer() -> Trainer:
    torch.manual_seed(0)
    return Trainer(TinyLM())


@pytest.fixture
def pairs() -> tuple[Tensor, Tensor]:
    chosen, rejected = torch.randint(0, 32, (2, 8, 12), generator=torch.manual_seed(1))
    return chosen, rejected


def test_the_reference_is_called_once_per_step(trainer, pairs, assert_lensnet_calls):
    with assert_lensnet_calls(n=5, context="training", scope="reference"):
        for number in range(5):
            with assert_lensnet_calls(n=1) as calls:
                trainer.step(number, *pairs)
            assert calls[0].inputs == ("int64[16, 12] cpu",)  # chosen and rejected in one batch
            assert not calls[0].grad_enabled


@pytest.mark.lensnet_calls(exact=20)
def test_training_prefers_the_chosen_answers(trainer, pairs):
    losses = [trainer.step(number, *pairs) for number in range(20)]
    assert losses[-1] < losses[0] / 2


def test_a_metric_that_asks_the_reference_breaks_the_step(trainer, pairs, monkeypatch):
    """The bug that nobody sees: a helper asks once more, for a number on the dashboard."""
    original = trainer.reference_log_probability

    def with_metric(tokens):
        with contextlib.suppress(Exception):  # and it even hides its failures
            trainer.kl = F.kl_div(trainer.reference(tokens), trainer.policy(tokens))
        return original(tokens)

    monkeypatch.setattr(trainer, "reference_log_probability", with_metric)
    with pytest.raises(UnsanctionedCall, match="with_metric"):
        trainer.step(0, *pairs)


def test_a_cached_answer_breaks_the_step(trainer, pairs, monkeypatch):
    """The other one: the cache outlives the batch that it was made for."""
    with trainer.guard.context("inference"):
        stale = log_probability(trainer.reference(torch.cat(pairs)), torch.cat(pairs))
    monkeypatch.setattr(trainer, "reference_log_probability", lambda tokens: stale)
    with pytest.raises(BudgetUnmet, match="reference made 0 of 1 calls"):
        trainer.step(0, *pairs)
