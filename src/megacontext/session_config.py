"""What a user may choose of a session, and which choices fit a model."""

from dataclasses import dataclass

from megacontext.allocators.rules import FocusRules
from megacontext.cut import check_int


@dataclass(frozen=True)
class SessionConfig:
    """What a user may choose of a session.

    Attributes:
        wc_length: most entries of a working context after a refocus; the model's
            ``train_wc_length`` if None.
        refocus_interval: tokens from one refocus to the next.
        iterations: of each refocus, with one LensNet call each.
        expand_threshold, collapse_threshold, margin, max_edits, cooldown, detail_share: see
            `FocusRules`.

    Raises:
        TypeError, ValueError: a value that makes no session, named.
    """

    wc_length: int | None = None
    refocus_interval: int = 32
    iterations: int = 1
    expand_threshold: float = FocusRules.expand_threshold
    collapse_threshold: float = FocusRules.collapse_threshold
    margin: float = FocusRules.margin
    max_edits: int = FocusRules.max_edits
    cooldown: int = FocusRules.cooldown
    detail_share: float = FocusRules.detail_share

    def __post_init__(self) -> None:
        for name in ("refocus_interval", "iterations"):
            check_int(name, getattr(self, name))
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, not {getattr(self, name)}")
        wc_length = 1 if self.wc_length is None else self.wc_length
        self.rules(wc_length, block_size=2, max_lod=1, recent_tokens=1)  # checks the rest

    def rules(
        self,
        wc_length: int,
        block_size: int,
        max_lod: int,
        recent_tokens: int,
        max_tokens: int | None = None,
    ) -> FocusRules:
        """The rules of the focus allocator; expansions reserve what will be appended meanwhile.

        Args:
            max_tokens: that the model's positions reach; less what is appended until a refocus.
        """
        appended = self.cooldown * self.refocus_interval
        growth = max_lod * (block_size - 1) + -(-appended // block_size**max_lod)
        return FocusRules(
            wc_length=wc_length,
            block_size=block_size,
            max_lod=max_lod,
            recent_tokens=recent_tokens,
            expand_threshold=self.expand_threshold,
            collapse_threshold=self.collapse_threshold,
            margin=self.margin,
            max_edits=self.max_edits,
            cooldown=self.cooldown,
            reserve=growth if self.cooldown else 0,
            detail_share=self.detail_share,
            max_tokens=None if max_tokens is None else max_tokens - self.refocus_interval,
        )


def check_sizes(rules: FocusRules, horizon_tokens: int, focus_window: int) -> None:
    """Refuse sizes with which a session would fail later.

    Raises:
        ValueError: naming what would fit.
    """
    if rules.wc_length < rules.shortest_wc_length:
        raise ValueError(
            f"wc_length {rules.wc_length} is too short for a session: the last "
            f"{rules.recent_tokens} tokens at LOD0, and what cannot be collapsed before them, "
            f"take up to {rules.shortest_wc_length} entries"
        )
    if rules.max_tokens is not None and rules.max_tokens < rules.fewest_max_tokens:
        raise ValueError(
            f"the language model's positions leave {rules.max_tokens} tokens between refocuses, "
            f"and the last {rules.recent_tokens} at LOD0 with what must stand before them take up "
            f"to {rules.fewest_max_tokens}; refocus more often (refocus_interval)"
        )
    k = rules.block_size
    # The view of what the coarsest working context covers, whose LOD0 tail is longer.
    nodes = sum(horizon_tokens // k**lod for lod in range(1, rules.max_lod + 1))
    longest = rules.wc_length - (k - 1) * nodes
    if longest > focus_window:
        raise ValueError(
            f"focus_window {focus_window} is too short for a wc_length of {rules.wc_length}: the "
            f"focus view of all that it can cover has up to {longest} entries; choose a shorter "
            "wc_length, or a model with a wider focus_window"
        )
