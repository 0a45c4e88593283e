"""What the language model loses on the horizon, by the cut that it reads, or in a session."""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
import torch.nn.functional as F

from megacontext.allocators.cut import Cut
from megacontext.config import MCConfig
from megacontext.controller import MCController
from megacontext.evaluation.pickers import Floats
from megacontext.evaluation.ways import ROUNDS, Picked
from megacontext.inference.session_config import SessionConfig, session_rules
from megacontext.model.tree import MegaContextTree
from megacontext.model.working_context import NO_LABEL

_LOGITS = 2**26  # computed at once: a quarter of a GiB in single precision


def at_once(mc: MCController, entries: int) -> int:
    """Count the contexts of so many entries that the language model may read at once."""
    return max(_LOGITS // (entries * mc.config.vocab_size), 1)


def horizon_nll(mc: MCController, tree: MegaContextTree, cuts: Sequence[Sequence[Cut]]) -> Floats:
    """Compute the mean NLL over the labels of the horizon.

    Args:
        mc: Its language model reads; some of the contexts at once.
        tree: Of S histories, all as long.
        cuts: V of each, ``[S][V]``.

    Returns:
        The means, nats, ``[S, V]``.
    """
    columns = len(cuts[0])
    together = at_once(mc, max(len(cut) for row in cuts for cut in row))
    rows = max(together // columns, 1)
    nll = np.empty((len(cuts), columns))
    for row in range(0, len(cuts), rows):
        histories = _histories(tree, slice(row, row + rows))
        for column in range(0, columns, together):
            some = slice(column, column + together)
            part = [of_history[some] for of_history in cuts[row : row + rows]]
            nll[row : row + rows, some] = _nll_at_once(mc, histories, part)
    return nll


def _nll_at_once(mc: MCController, tree: MegaContextTree, cuts: Sequence[Sequence[Cut]]) -> Floats:
    with torch.no_grad():
        context = tree.working_context(cuts)
        nll = mc.token_nll(context)
    horizon = tree.lengths[0] - mc.config.horizon_tokens
    counted = (context.starts + context.spans >= horizon) & (context.labels != NO_LABEL)
    mean = (nll * counted).sum(-1) / counted.sum(-1)
    out: Floats = mean.view(len(cuts), -1).double().numpy(force=True)
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


def session_losses(mc: MCController, tree: MegaContextTree) -> Picked:
    """Let each history come bit by bit, refocused again and again, up to the horizon.

    The session's budget leaves room for the horizon, so that the length is equal at its end.

    Args:
        mc: Holds the sessions.
        tree: Of S histories, all as long.

    Returns:
        The mean NLL over the labels of the horizon, nats, ``[S]``, and the cuts at the end.
    """
    config, length = mc.config, tree.lengths[0]
    nll: list[float] = []
    cuts: list[Cut] = []
    settings = _settings(config)
    horizon = length - config.horizon_tokens
    interval = settings.refocus_interval
    first = horizon % interval + interval
    for history, labels in zip(tree.tokens, tree.labels[:, horizon:], strict=True):
        logits = mc.begin_inference_session(history[:first], settings=settings)
        for begin in range(first, horizon, interval):
            logits = mc.inference_step(history[begin : begin + interval])
        read = logits[0, -1:]
        if config.horizon_tokens > 1:
            read = torch.cat([read, mc.inference_step(history[horizon:-1])[0]])
        nll.append(float(F.cross_entropy(read, labels, ignore_index=NO_LABEL)))
        cuts.append(mc.inference_cut)
        mc.end_inference_session()
    return np.array(nll), cuts


def _settings(config: MCConfig) -> SessionConfig:
    """Return those of a session whose working contexts are as long as others with the horizon."""
    return SessionConfig(
        wc_length=config.train_wc_length - config.horizon_tokens,
        refocus_interval=config.recent_tokens,
        iterations=ROUNDS,
        expand_threshold=-np.inf,
        margin=0.0,
        max_edits=config.sequence_tokens,
    )
