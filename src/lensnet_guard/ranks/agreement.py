"""Agreement: whether ranks can still become equal, from what two of them have made. Pure."""

from typing import Literal

from lensnet_guard.ranks.progress import Count


def judge(
    written: Count | None, mine: Count, before: Count | None
) -> Literal["apart", "write"] | None:
    """Judge what this rank has made by what a rank has made that waits at a comparison.

    Counts only grow, and those of a rank that waits cannot, until all have come. So two ranks are
    apart whenever each of them was looked at, and stay so. A rank that is slow has made less than
    it will, and is never told from one that will make as much.

    Args:
        written: What was written down last by a rank that waited at a comparison.
        mine: What this rank has made.
        before: What it had made when it was judged last; a comparison that is over by the next
            judgement is nobody's concern.

    Returns:
        ``"apart"`` when the two can never be equal; ``"write"`` when this rank waits where none has
        written down that it does, so that the others can judge themselves by it.
    """
    if written is not None and written.window == mine.window:
        return "apart" if _differ(written, mine) else None
    is_news = mine.final and (written is None or written.window < mine.window)
    return "write" if is_news and mine == before else None


def _differ(written: Count, mine: Count) -> bool:
    """Whether a rank has made what another, which has made all it will, has not."""
    if mine.final:
        return mine.numbers != written.numbers
    made = zip((mine.micro_steps, *mine.calls), (written.micro_steps, *written.calls), strict=True)
    return any(here > there for here, there in made)
