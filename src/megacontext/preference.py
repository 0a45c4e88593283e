"""Preference learning: pairs of variants, what each says of a gist, and the Bradley-Terry loss.

Pure functions on tensors, over all pairs of a sequence's variants at once. A pair labels a gist of
the focus view +1 where only its better variant holds the span at LOD0, -1 where only the worse one
does, and 0 (masked) elsewhere. The pair's policy score is the sum of label · score: what each gist
is worth adds up, so one that matters decides the pair, and the rest may stay near 0. The
Bradley-Terry model makes a probability of it (Bradley and Terry 1952), and the pair counts by how
clearly its losses differ.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class PreferencePairs:
    """All P = V(V-1)/2 pairs of each sequence's variants.

    Attributes:
        advantages: NLL of the pair's second variant less that of its first, nats, ``[B, P]``.
        labels: +1 where only the first variant holds the entry's span at LOD0, -1 where only the
            second does, else 0; 0 outside gists; ``[B, P, E]``.
    """

    advantages: Tensor
    labels: Tensor


def make_pairs(nll: Tensor, held: Tensor, gists: Tensor) -> PreferencePairs:
    """Pair up variants.

    Args:
        nll: Of each variant, summed over the horizon, nats, ``[B, V]``; taken as constant.
        held: Whether a variant holds an entry's span at LOD0, bool ``[B, V, E]``.
        gists: Which entries of the view are gists, bool ``[B, E]``.

    Returns:
        The pairs.
    """
    first, second, advantages = paired(nll)
    held_gists = (held & gists[:, None]).to(nll.dtype)
    return PreferencePairs(advantages, labels=held_gists[:, first] - held_gists[:, second])


def paired(nll: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Number all pairs of variants, and say by how much the first of each is better.

    Args:
        nll: Of each variant, nats, ``[B, V]``; taken as constant.

    Returns:
        Numbers of the pairs' first and second variants, int64 ``[P]`` each; and the NLL of the
        second less that of the first, nats, ``[B, P]``.
    """
    first, second = torch.triu_indices(nll.shape[1], nll.shape[1], offset=1, device=nll.device)
    constant = nll.detach()
    return first, second, constant[:, second] - constant[:, first]


def policy_scores(scores: Tensor, pairs: PreferencePairs) -> tuple[Tensor, Tensor]:
    """Compute what LensNet's scores say of each pair: positive prefers its first variant.

    Args:
        scores: LensNet's, in [-1, 1], ``[B, E]``.
        pairs: Of the variants.

    Returns:
        The sum of the differing gists' scores, signed by who holds them, ``[B, P]``; and whether
        there is one, bool ``[B, P]``.
    """
    total = (pairs.labels @ scores[..., None]).squeeze(-1)
    return total, pairs.labels.any(-1)


def preference_loss(
    scores: Tensor, pairs: PreferencePairs, *, temperature: float, advantage_scale: float
) -> Tensor:
    """Compute the weighted Bradley-Terry logistic loss.

    Args:
        scores: LensNet's, ``[B, E]``.
        pairs: Of the variants.
        temperature: Divides the policy score.
        advantage_scale: A pair weighs tanh(advantage_scale · |advantage|).

    Returns:
        The loss, scalar; 0 when no pair says anything.
    """
    policy, informative = policy_scores(scores, pairs)
    logits = policy * pairs.advantages.sign() / temperature
    weights = torch.tanh(advantage_scale * pairs.advantages.abs()) * informative
    return (F.softplus(-logits) * weights).sum() / weights.sum().clamp(min=1e-6)


def preference_metrics(scores: Tensor, pairs: PreferencePairs, gists: Tensor) -> dict[str, Tensor]:
    """Compute how scores and advantages relate.

    Args:
        scores: LensNet's, ``[B, E]``.
        pairs: Of the variants.
        gists: Which entries are gists, bool ``[B, E]``.

    Returns:
        Scalars on the device, nan where undefined. ``adv_delta_*`` is the gap between better and
        worse variant in nats; ``preference_agreement`` the share of informative pairs that the
        scores order as the losses do; ``preference_corr`` the correlation of policy score and
        advantage over them.
    """
    scores = scores.detach()
    policy, informative = policy_scores(scores, pairs)
    gap = pairs.advantages.abs()
    agree = (policy * pairs.advantages > 0) & informative
    entries = gists.sum(-1).clamp(min=1)
    mean = (scores * gists).sum(-1) / entries
    variance = ((scores - mean[:, None]).square() * gists).sum(-1) / entries
    return {
        "adv_delta_mean": gap.mean(),
        "adv_delta_p95": _quantile(gap.float(), 0.95),
        "adv_delta_std": gap.std(correction=0),
        "preference_agreement": agree.sum() / informative.sum(),
        "preference_corr": _correlation(policy, pairs.advantages, informative),
        "policy_score_abs_mean": (scores.abs() * gists).sum() / gists.sum(),
        "policy_score_std_mean": variance.sqrt().mean(),
    }


def _quantile(values: Tensor, share: float) -> Tensor:
    """Do as ``torch.quantile``, which takes longer, and on torch 2.7 waits for the device."""
    ordered = values.flatten().sort().values
    place = share * (len(ordered) - 1)
    below = int(place)
    above = min(below + 1, len(ordered) - 1)
    return torch.lerp(ordered[below], ordered[above], place - below)


def _correlation(x: Tensor, y: Tensor, mask: Tensor) -> Tensor:
    """Compute Pearson's r over the masked elements, scalar."""
    count = mask.sum()
    x = torch.where(mask, x - (x * mask).sum() / count, 0.0)
    y = torch.where(mask, y - (y * mask).sum() / count, 0.0)
    return (x * y).sum() / (x.square().sum() * y.square().sum()).sqrt()
