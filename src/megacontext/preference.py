"""Preference learning: which gists should the better variant's LensNet have expanded?

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
        nll: summed over the horizon, nats, ``[B, V]``; taken as constant.
        held: whether a variant holds an entry's span at LOD0, bool ``[B, V, E]``.
        gists: which entries of the view are gists, bool ``[B, E]``.
    """
    first, second = torch.triu_indices(nll.shape[1], nll.shape[1], offset=1, device=nll.device)
    nll, held_gists = nll.detach(), (held & gists[:, None]).to(nll.dtype)
    return PreferencePairs(
        advantages=nll[:, second] - nll[:, first],
        labels=held_gists[:, first] - held_gists[:, second],
    )


def make_plain_pairs(nll: Tensor, finer: Tensor, coarser: Tensor) -> PreferencePairs:
    """Pair up variants as the plain recipe does: LensNet scores the variants themselves.

    An entry of the pair's worse variant is told +1 where the better one holds all of its span in
    more detail, -1 where it holds it in less. For an ablation.

    Args:
        nll: as for `make_pairs`, ``[B, V]``.
        finer, coarser: whether variant i holds entry e of variant j in more or in less detail than
            j does, bool ``[B, V, V, W]`` by (i, j, e).

    Returns:
        pairs for scores ``[B, V · W]``.
    """
    batch, variants, _, width = finer.shape
    first, second = torch.triu_indices(variants, variants, offset=1, device=nll.device)
    told = finer.to(nll.dtype) - coarser.to(nll.dtype)
    advantages = nll.detach()[:, second] - nll.detach()[:, first]
    first_is_better = advantages > 0
    better = torch.where(first_is_better, first, second)
    worse = torch.where(first_is_better, second, first)
    of_worse = told[torch.arange(batch, device=nll.device)[:, None], better, worse]  # [B, P, W]
    labels = torch.zeros(*worse.shape, variants, width, device=nll.device, dtype=nll.dtype)
    labels.scatter_(2, worse[..., None, None].expand(-1, -1, 1, width), of_worse[:, :, None])
    sign = torch.where(first_is_better, 1.0, -1.0)  # the policy prefers the first where positive
    return PreferencePairs(advantages, labels.flatten(2) * sign[..., None])


def policy_scores(scores: Tensor, pairs: PreferencePairs) -> tuple[Tensor, Tensor]:
    """What LensNet's scores say of each pair: positive prefers its first variant.

    Args:
        scores: LensNet's, in [-1, 1], ``[B, E]``.

    Returns:
        the sum of the differing gists' scores, signed by who holds them, ``[B, P]``; and whether
        there is one, bool ``[B, P]``.
    """
    total = (pairs.labels @ scores[..., None]).squeeze(-1)
    return total, pairs.labels.any(-1)


def preference_loss(
    scores: Tensor,
    pairs: PreferencePairs,
    *,
    temperature: float,
    advantage_scale: float,
    standardize: bool = False,
) -> Tensor:
    """Weighted Bradley-Terry logistic loss, scalar; 0 when no pair says anything.

    Args:
        scores: LensNet's, ``[B, E]``.
        temperature: divides the policy score.
        advantage_scale: a pair weighs tanh(advantage_scale · |advantage|).
        standardize: divide advantages by their root mean square first.
    """
    policy, informative = policy_scores(scores, pairs)
    logits = policy * pairs.advantages.sign() / temperature
    gaps = pairs.advantages.abs()
    if standardize:
        gaps = gaps / gaps.square().mean().sqrt().clamp(min=1e-6)
    weights = torch.tanh(advantage_scale * gaps) * informative
    return (F.softplus(-logits) * weights).sum() / weights.sum().clamp(min=1e-6)


def rank_loss(scores: Tensor, pairs: PreferencePairs, *, margin: float = 1.0) -> Tensor:
    """Hinge: the better variant's policy score should lead by ``margin``; scalar."""
    policy, informative = policy_scores(scores, pairs)
    short = F.relu(margin - policy * pairs.advantages.sign()) * informative
    return short.sum() / informative.sum().clamp(min=1)


def budget_loss(scores: Tensor, gists: Tensor) -> Tensor:
    """Squared mean score of a view's gists: expansions and collapses should balance; scalar.

    Args:
        scores: LensNet's, ``[B, E]``. gists: which entries count, bool ``[B, E]``.
    """
    mean = (scores * gists).sum(-1) / gists.sum(-1).clamp(min=1)
    return mean.square().mean()


def preference_metrics(scores: Tensor, pairs: PreferencePairs, gists: Tensor) -> dict[str, Tensor]:
    """How scores and advantages relate; scalars on the device, nan where undefined.

    ``adv_delta_*`` is the gap between better and worse variant in nats; ``preference_agreement``
    the share of informative pairs that the scores order as the losses do; ``preference_corr`` the
    correlation of policy score and advantage over them.
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
    """As ``torch.quantile``, which takes longer, and on torch 2.7 waits for the device; scalar."""
    ordered = values.flatten().sort().values
    place = share * (len(ordered) - 1)
    below = int(place)
    above = min(below + 1, len(ordered) - 1)
    return torch.lerp(ordered[below], ordered[above], place - below)


def _correlation(x: Tensor, y: Tensor, mask: Tensor) -> Tensor:
    """Pearson's r over the masked elements, scalar."""
    count = mask.sum()
    x = torch.where(mask, x - (x * mask).sum() / count, 0.0)
    y = torch.where(mask, y - (y * mask).sum() / count, 0.0)
    return (x * y).sum() / (x.square().sum() * y.square().sum()).sqrt()
