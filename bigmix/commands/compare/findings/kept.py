"""Defines when something that the base knew is lost, and how much of it is kept.

All other code of a comparison asks here, so that no page, table or headline claims more.
"""

from typing import Literal

from bigmix.commands.compare.measures import Spread

Verdict = Literal["nothing", "all", "most", "part", "unclear", "lost", "more"]
# Nats per token, and fractions: half of the last decimal that a headline shows.
LEAST_LOST = 0.005
MOST = 0.5  # of what one-way training lost
ALL = 0.9
# From the best to the worst.
VERDICTS: tuple[Verdict, ...] = ("nothing", "all", "most", "part", "unclear", "lost", "more")
GOOD: tuple[Verdict, ...] = ("nothing", "all", "most")
DEFINITION = (
    "Lost: 0.005 or more, and the whole interval is above 0. Kept all: not lost, and the whole"
    " interval is at most a tenth of what one-way training lost. Kept, with a percentage: the whole"
    " interval is at most half of it. Kept in part: lost, but the whole interval is below that of"
    " one-way training. Unclear: neither lost nor kept. The interval is the 95 % interval; of"
    " several seeds, from the lowest to the highest end of theirs."
)


def is_lost(loss: Spread) -> bool:
    """Whether something is certainly lost, and enough of it to be shown. `loss` is above 0 where
    something was lost.
    """
    return loss.mean >= LEAST_LOST and loss.reach[0] > 0


def verdict_of(loss: Spread, one_way: Spread | None) -> Verdict:
    """What training kept of what one-way training lost, by what both lost.

    nothing  one-way training did not lose it, and this training neither
    all      not lost, and the whole interval is at most a tenth of what one-way training lost
    most     the whole interval is at most half of what one-way training lost
    part     lost, but less than one-way training lost
    unclear  not lost, but the interval is too wide for any of these
    lost     lost, perhaps as much as by one-way training, or there is no one-way training
    more     lost, and more than by one-way training

    Less and more are those of intervals that do not overlap, which `all` and `most` need as well.
    """
    lost = is_lost(loss)
    low, high = loss.reach
    if one_way is None:
        return "lost" if lost else "nothing"
    if not is_lost(one_way):
        return "more" if lost and low > one_way.reach[1] else "lost" if lost else "nothing"
    least, largest = one_way.reach
    if high < least and not lost and high <= (1 - ALL) * one_way.mean:
        return "all"
    if high < least and high <= (1 - MOST) * one_way.mean:
        return "most"
    if not lost:
        return "unclear"
    if high < least:
        return "part"
    return "more" if low > largest else "lost"


def percent_kept(loss: Spread, one_way: Spread) -> int | None:
    """The part that was kept of what one-way training lost, in percent and rounded down, so that
    99.6 % is not shown as 100 %; None where it is not from 0 to 99.
    """
    kept = int(100 * (1 - loss.mean / one_way.mean))
    return kept if 0 <= kept < 100 else None
