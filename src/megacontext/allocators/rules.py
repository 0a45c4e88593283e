"""The rules of the focus allocator, and what they make of lengths. Integers only."""

import math
from dataclasses import dataclass

from megacontext.cut import UnreachableTarget, check_block_size, check_int


@dataclass(frozen=True)
class FocusRules:
    """How scores become edits.

    Attributes:
        wc_length: most entries of an edited working context, W. It is a soft budget: tokens that
            are appended exceed it until the next iteration, which brings it back, whatever it
            takes.
        block_size, max_lod, recent_tokens: of the tree, and the protected tail.
        expand_threshold: only what scores above it is expanded.
        collapse_threshold: only what scores no more is collapsed to make room for an expansion.
        margin: an expansion that needs room takes it from a collapse that scores less by so much.
        max_edits: of one iteration; only what the budget forces may exceed it.
        cooldown: iterations for which what was expanded is not collapsed, and the reverse.
        reserve: entries that expansions leave free as long as they rest. Where it is as much as
            the coarsest cut grows in ``cooldown`` iterations, the budget never has to collapse
            what was just expanded.
        detail_share: of the entries beside the tail, those that are freed for detail when the
            history must lose its oldest entries.
        max_tokens: the most tokens that a working context may cover, however coarsely; None for
            any number.

    Raises:
        TypeError, ValueError: a value that makes no rule, named.
    """

    wc_length: int
    block_size: int
    max_lod: int
    recent_tokens: int
    expand_threshold: float = 0.0
    collapse_threshold: float = 1.0
    margin: float = 0.1
    max_edits: int = 64
    cooldown: int = 2
    reserve: int = 0
    detail_share: float = 0.5
    max_tokens: int | None = None

    def __post_init__(self) -> None:
        check_block_size(self.block_size, self.max_lod)
        least = {"wc_length": 1, "recent_tokens": 1, "max_edits": 0, "cooldown": 0, "reserve": 0}
        for name, bound in least.items():
            check_int(name, getattr(self, name))
            if getattr(self, name) < bound:
                raise ValueError(f"{name} must be at least {bound}, not {getattr(self, name)}")
        for name in ("expand_threshold", "collapse_threshold", "margin", "detail_share"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, (int, float)):
                raise TypeError(f"{name} must be a number, not {value!r}")
            if math.isnan(value):
                raise ValueError(f"{name} must be a number, not nan")
        if self.margin < 0:
            raise ValueError(f"margin must not be negative, but is {self.margin}")
        if not 0 <= self.detail_share <= 1:
            raise ValueError(f"detail_share must lie in [0, 1], not {self.detail_share}")

    @property
    def shortest_wc_length(self) -> int:
        """The least ``wc_length`` that holds the protected tail wherever the history ends."""
        return self.recent_tokens + self.max_lod * (self.block_size - 1)

    @property
    def fewest_max_tokens(self) -> int:
        """The least ``max_tokens`` that holds the protected tail wherever the history ends."""
        fewest: int = self.recent_tokens + self.block_size**self.max_lod - 1
        return fewest


def coarsest_length(first: int, end: int, rules: FocusRules) -> int:
    """Entries of a cut of tokens ``[first, end)`` that is as coarse as it can be."""
    editable, nodes = end - rules.recent_tokens, 0
    for lod in range(1, rules.max_lod + 1):
        span = rules.block_size**lod
        nodes += max(editable // span - -(-first // span), 0)
    return end - first - (rules.block_size - 1) * nodes


def first_that_fits(first: int, end: int, rules: FocusRules) -> int:
    """Where a cut must begin so that it fits: ``max_tokens``, and, as coarse as it can be, W.

    That is ``first`` if it can be; else a multiple of the coarsest span that leaves room for
    detail, so that the history is not cut off again after every few tokens.

    Raises:
        UnreachableTarget: ``wc_length`` does not even hold the protected tail.
    """
    span = rules.block_size**rules.max_lod
    if rules.max_tokens is not None and end - first > rules.max_tokens:
        first = -(-(end - rules.max_tokens) // span) * span
    if coarsest_length(first, end, rules) <= rules.wc_length:
        return first
    newest = (end - rules.recent_tokens) // span * span
    shortest = coarsest_length(max(newest, first), end, rules)
    if newest < first or shortest > rules.wc_length:
        raise UnreachableTarget(
            f"a working context of {rules.wc_length} entries cannot hold the last "
            f"{rules.recent_tokens} tokens at LOD0 and what remains before them: "
            f"that takes {shortest}"
        )
    for_detail = int((rules.wc_length - rules.recent_tokens) * rules.detail_share)
    target = max(rules.wc_length - rules.reserve - for_detail, shortest)
    first = -(-first // span) * span
    over = coarsest_length(first, end, rules) - target
    fits: int = min(first + max(over, 0) * span, newest)
    return fits
