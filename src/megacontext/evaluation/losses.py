"""What the language model loses on the horizon, by the cut that it reads, or in a session."""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from megacontext.allocators.cut import Cut
from megacontext.config import MCConfig
from megacontext.controller import MCController
from megacontext.evaluation.memo import Memo, key_of
from megacontext.evaluation.pickers import Floats
from megacontext.evaluation.ways import ROUNDS, Picked
from megacontext.inference.session_config import SessionConfig, session_rules
from megacontext.model.tree import MegaContextTree
from megacontext.model.working_context import NO_LABEL


def keys_of(tree: MegaContextTree, of_model: str) -> list[str]:
    """Return a key of each history, by its tokens, its labels and what makes its losses."""
    both = tree.tokens.numpy(force=True), tree.labels.numpy(force=True)
    return [key_of(of_model, tokens, labels) for tokens, labels in zip(*both, strict=True)]


def horizon_nll(mc: MCController, tree: MegaContextTree, cuts: Sequence[Sequence[Cut]]) -> Floats:
    """Compute the mean NLL over the labels of the horizon.

    Args:
        mc: Its language model reads; some of the contexts at once.
        tree: Of S histories, all as long.
        cuts: V of each, ``[S][V]``.

    Returns:
        The means, nats, ``[S, V]``.
    """
    pairs = [(row, cut) for row, of_history in enumerate(cuts) for cut in of_history]
    return pairs_nll(mc, tree, pairs).reshape(len(cuts), -1)


def pairs_nll(mc: MCController, tree: MegaContextTree, pairs: Sequence[tuple[int, Cut]]) -> Floats:
    """Compute the mean NLL over the labels of the horizon.

    Args:
        mc: Its language model reads; some of the contexts at once.
        tree: Of S histories, all as long.
        pairs: P numbers of histories, in ascending order, each with a cut.

    Returns:
        The means, nats, ``[P]``.
    """
    longest = max(len(cut) for _, cut in pairs)
    together = mc.at_once(longest, mc.config.horizon_tokens + 1)
    parts = [pairs[first : first + together] for first in range(0, len(pairs), together)]
    return np.concatenate([_nll_at_once(mc, tree, part) for part in parts])


def _nll_at_once(
    mc: MCController, tree: MegaContextTree, pairs: Sequence[tuple[int, Cut]]
) -> Floats:
    first, horizon = pairs[0][0], mc.config.horizon_tokens
    cuts: list[list[Cut]] = [[] for _ in range(first, pairs[-1][0] + 1)]
    for row, cut in pairs:
        cuts[row - first].append(cut)
    with torch.no_grad():
        context = _histories(tree, slice(first, first + len(cuts))).working_context(cuts)
        nll = mc.token_nll(context, horizon + 1)[:, :-1]  # all end with the horizon, at LOD0
    counted = context.labels[:, -horizon - 1 : -1] != NO_LABEL
    out: Floats = ((nll * counted).sum(-1) / counted.sum(-1)).double().numpy(force=True)
    return out


def _histories(tree: MegaContextTree, rows: slice) -> MegaContextTree:
    """Return the tree of some of the histories, without a copy."""
    return replace(
        tree,
        tokens=tree.tokens[rows],
        labels=tree.labels[rows],
        lengths=tree.lengths[rows],
        levels=tree.levels[rows],
    )


def no_session(mc: MCController) -> str:
    """Say why the sizes of a model leave no room for `session_losses`; "" where they do."""
    try:
        session_rules(mc.config, _settings(mc.config), mc.language_model.max_tokens)
    except ValueError as error:
        return str(error)
    return ""


def session_losses(
    mc: MCController, tree: MegaContextTree, keys: Sequence[str], memo: Memo
) -> Picked:
    """Let each history come bit by bit, refocused again and again, up to the horizon.

    The session's budget leaves room for the horizon, so that the length is equal at its end.

    Args:
        mc: Holds the sessions.
        tree: Of S histories, all as long.
        keys: Of each, as `memo` is to know it.
        memo: Knows what was computed before.

    Returns:
        The mean NLL over the labels of the horizon, nats, ``[S]``, and the cuts at the end.
    """
    width = mc.config.train_wc_length

    def compute(rows: list[int]) -> Floats:
        padded = np.full((len(rows), 1 + 2 * width), -1.0)
        for into, row in zip(padded, rows, strict=True):
            nll, cut = _session_loss(mc, tree.tokens[row], tree.labels[row])
            into[0], into[1 : 1 + len(cut)] = nll, cut.positions
            into[1 + width : 1 + width + len(cut)] = cut.lods
        return padded

    kept = memo.many(keys, compute)
    cuts = [
        Cut(positions[positions >= 0], lods[lods >= 0], mc.config.block_size)
        for positions, lods in kept[:, 1:].reshape(len(kept), 2, width).astype(np.int64)
    ]
    return kept[:, 0], cuts


def _session_loss(mc: MCController, history: Tensor, labels: Tensor) -> tuple[float, Cut]:
    """Return the mean NLL over the labels of one horizon, and the cut at the end."""
    config, length = mc.config, len(history)
    settings = _settings(config)
    horizon = length - config.horizon_tokens
    interval = settings.refocus_interval
    first = horizon % interval + interval
    logits = mc.begin_inference_session(history[:first], settings=settings)
    for begin in range(first, horizon, interval):
        logits = mc.inference_step(history[begin : begin + interval])
    read = logits[0, -1:]
    if config.horizon_tokens > 1:
        read = torch.cat([read, mc.inference_step(history[horizon:-1])[0]])
    nll = float(F.cross_entropy(read, labels[horizon:], ignore_index=NO_LABEL))
    cut = mc.inference_cut
    mc.end_inference_session()
    return nll, cut


def _settings(config: MCConfig) -> SessionConfig:
    """Return those of a session whose working contexts are as long as others with the horizon."""
    return SessionConfig(
        wc_length=config.train_wc_length - config.horizon_tokens,
        refocus_interval=config.recent_tokens,
        iterations=ROUNDS,
        cooldown=0,  # rounds are enough; what rests needs room that a short context has not
        expand_threshold=-np.inf,
        margin=0.0,
        max_edits=config.sequence_tokens,
    )
