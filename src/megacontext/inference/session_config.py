"""What a user may choose of a session, and which choices fit a model."""

from dataclasses import dataclass

from megacontext.allocators.cut import Geometry
from megacontext.allocators.rules import FocusRules, FocusTuning, longest_cover
from megacontext.checks import check_at_least
from megacontext.config import MCConfig


@dataclass(frozen=True)
class SessionConfig(FocusTuning):
    """What a user may choose of a session: a `FocusTuning`, and how often it is asked for.

    Attributes:
        wc_length: The most entries of a working context after a refocus; the model's
            ``train_wc_length`` if None.
        refocus_interval: Tokens from one refocus to the next.
        iterations: Of each refocus, with one LensNet call each.

    Raises:
        TypeError: A value of another type; the message names it.
        ValueError: A value that makes no session; the message names it.
    """

    wc_length: int | None = None
    refocus_interval: int = 32
    iterations: int = 1

    def __post_init__(self) -> None:
        for name in ("refocus_interval", "iterations"):
            check_at_least(name, getattr(self, name), 1)
        if self.wc_length is not None:
            check_at_least("wc_length", self.wc_length, 1)
        super().__post_init__()

    def rules(self, geometry: Geometry, max_tokens: int | None = None) -> FocusRules:
        """Make the rules of the focus allocator; expansions reserve what is appended meanwhile.

        Args:
            geometry: Of the tree; its window is the length of working contexts.
            max_tokens: The most that the model's positions reach, of which working contexts may
                cover less what is appended until a refocus; None for any number.

        Returns:
            The rules.
        """
        return FocusRules(
            geometry,
            tuning=self,
            reserve=longest_cover(self.cooldown * self.refocus_interval, geometry),
            max_tokens=None if max_tokens is None else max_tokens - self.refocus_interval,
        )


def session_rules(model: MCConfig, settings: SessionConfig, max_tokens: int | None) -> FocusRules:
    """Make the rules of settings for a model.

    Args:
        model: Its sizes.
        settings: The user's.
        max_tokens: The most tokens that its positions reach; None for any number.

    Returns:
        The rules.

    Raises:
        ValueError: Sizes with which a session would fail later; the message names what would fit.
    """
    geometry = model.geometry.within(settings.wc_length or model.train_wc_length)
    rules = settings.rules(geometry, max_tokens)
    recent = geometry.recent_tokens
    if rules.wc_length < rules.shortest_wc_length:
        raise ValueError(
            f"wc_length {rules.wc_length} is too short for a session: the last "
            f"{recent} tokens at LOD0, and what cannot be collapsed before them, "
            f"take up to {rules.shortest_wc_length} entries"
        )
    if rules.max_tokens is not None and rules.max_tokens < rules.fewest_max_tokens:
        raise ValueError(
            f"the language model's positions leave {rules.max_tokens} tokens between refocuses, "
            f"and the last {recent} at LOD0 with what must stand before them take up "
            f"to {rules.fewest_max_tokens}; refocus more often (refocus_interval)"
        )
    k = geometry.block_size
    # The view of what the coarsest working context covers, whose LOD0 tail is longer.
    nodes = sum(model.horizon_tokens // k**lod for lod in range(1, geometry.max_lod + 1))
    longest = rules.wc_length - (k - 1) * nodes
    if longest > model.focus_window:
        raise ValueError(
            f"focus_window {model.focus_window} is too short for a wc_length of "
            f"{rules.wc_length}: the focus view of all that it can cover has up to {longest} "
            "entries; choose a shorter wc_length, or a model with a wider focus_window"
        )
    return rules
