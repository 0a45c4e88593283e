"""The ways to pick a working context, by name and kind, and which of them to compare."""

from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum

from megacontext.allocators.cut import Cut
from megacontext.evaluation.pickers import Embed, Floats

ROUNDS = 4  # of refocusing, where one is not enough: LOD2 to LOD0 takes two

LENSNET = "LensNet focus"
RECENCY = "recency window"
RANDOM = "random collapse"
ORACLE = "oracle"
GREEDY = "greedy oracle"
SALIENCE = "salience"
ASKED = "the facts that are asked for"
FULL = "full context"
SESSION = f"{LENSNET}, in a session"
UNIFORM = "uniform LOD"
EVENLY = "evenly spaced blocks"
LEXICAL = "lexical, last 16"
BM25 = "BM25, last 16"
MINILM = "MiniLM, last 16"

# What a sceptic names first: each takes a reading of its own, and some take dozens.
MAIN = (RECENCY, UNIFORM, EVENLY, RANDOM, LEXICAL, BM25, MINILM, LENSNET, ASKED, FULL)


class Kind(Enum):
    """What a way goes by; the order is that of tables."""

    PLACES = "fixed or random places"
    WORDS = "words in common with the tail"
    VECTORS = "embeddings, attention"
    LENSNET = "LensNet"
    KNOWLEDGE = "more than can be known"

    @property
    def is_baseline(self) -> bool:
        """Whether it sees no more than LensNet does, and is not LensNet."""
        return self not in (Kind.LENSNET, Kind.KNOWLEDGE)


Picked = tuple[Floats, list[Cut]]  # NLL per sequence, nats, [S], and the cuts


@dataclass(frozen=True)
class Comparing:
    """What to compare.

    Attributes:
        oracle_draws: Random cuts of which the oracle takes the best; 0 leaves it out.
        attention: Also pick by what the language model attends to.
        greedy: Also add blocks one by one, each the one that helps most.
        in_session: Also let each history come bit by bit, where sizes leave room for a session.
        gists: Hold as gists what is not held in detail; else leave it out, for all ways alike.
        all_ways: Compare all of them; else those of `MAIN` alone.
        embed: Embeds texts, for pickers by similarity; None leaves them out.
    """

    oracle_draws: int = 64
    attention: bool = True
    greedy: bool = True
    in_session: bool = True
    gists: bool = True
    all_ways: bool = True
    embed: Embed | None = None


@dataclass(frozen=True)
class Way:
    """A way to pick.

    Attributes:
        name: Its own.
        kind: What it goes by.
        pick: Picks for all sequences of the batch.
    """

    name: str
    kind: Kind
    pick: Callable[[], Picked]
