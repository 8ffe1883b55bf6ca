"""The definition of lost and kept, verdict by verdict."""

import pytest

from bigmix.commands.compare.findings.kept import is_lost, percent_kept, verdict_of
from bigmix.commands.compare.measures import Spread, drop, spread_of
from bigmix.evaluation.bootstrap import Estimate

ONE_WAY = (0.239, 0.229, 0.249)  # the loss and the ends of its interval


def loss(value: float, low: float, high: float) -> Spread:
    return spread_of([Estimate(value=value, low=low, high=high)])


@pytest.mark.parametrize(
    ("two_way", "one_way", "verdict"),
    [
        # Less than the tenth of 0.239, and 0 is in the interval.
        ((0.002, -0.010, 0.020), ONE_WAY, "all"),
        ((-0.100, -0.120, -0.080), ONE_WAY, "all"),
        # Below what a headline shows, however certain.
        ((0.002, 0.001, 0.003), ONE_WAY, "all"),
        # A loss is certain, so not all was kept, however little it is.
        ((0.006, 0.005, 0.007), ONE_WAY, "most"),
        ((0.039, 0.029, 0.049), ONE_WAY, "most"),
        # 0 is in the interval, but so is more than a tenth.
        ((0.002, -0.030, 0.034), ONE_WAY, "most"),
        # Half of the loss by its value, more by its interval.
        ((0.110, 0.090, 0.130), ONE_WAY, "part"),
        ((0.200, 0.190, 0.210), ONE_WAY, "part"),
        # Neither a loss nor that half was kept is certain.
        ((0.050, -0.100, 0.200), ONE_WAY, "unclear"),
        ((-0.100, -0.400, 0.200), ONE_WAY, "unclear"),
        # The intervals overlap.
        ((0.220, 0.200, 0.240), ONE_WAY, "lost"),
        ((0.255, 0.245, 0.265), ONE_WAY, "lost"),
        ((0.300, 0.290, 0.310), ONE_WAY, "more"),
        # What one-way training lost is itself uncertain: at most half of 0.3, but not less than
        # the 0.05 that it may be.
        ((0.100, 0.080, 0.120), (0.300, 0.050, 0.550), "lost"),
        # Nothing was lost that could be kept.
        ((0.003, -0.010, 0.016), (0.004, -0.010, 0.018), "nothing"),
        ((0.100, 0.050, 0.150), (0.020, -0.010, 0.040), "more"),
        ((0.100, 0.030, 0.150), (0.020, -0.010, 0.040), "lost"),
        # Without one-way training there is only lost or not.
        ((0.003, -0.010, 0.016), None, "nothing"),
        ((0.100, 0.050, 0.150), None, "lost"),
        # Without intervals the values count.
        ((0.039, float("nan"), float("nan")), (0.239, float("nan"), float("nan")), "most"),
        ((0.200, float("nan"), float("nan")), (0.239, float("nan"), float("nan")), "part"),
    ],
)
def test_the_verdict_on_what_was_kept(
    two_way: tuple[float, float, float], one_way: tuple[float, float, float] | None, verdict: str
) -> None:
    assert verdict_of(loss(*two_way), None if one_way is None else loss(*one_way)) == verdict


def test_a_verdict_holds_for_every_seed() -> None:
    seeds = [Estimate(value=v, low=v - 0.01, high=v + 0.01) for v in (0.02, 0.03, 0.115)]
    one_way = loss(*ONE_WAY)
    assert verdict_of(spread_of(seeds[:2]), one_way) == "most"
    # The mean and Student's interval would not show that one seed lost more than half.
    assert verdict_of(spread_of(seeds), one_way) == "part"
    assert spread_of(seeds).reach == pytest.approx((0.01, 0.125))


def test_what_is_below_the_last_decimal_of_a_headline_is_not_lost() -> None:
    assert not is_lost(loss(0.0049, 0.004, 0.006))
    assert is_lost(loss(0.005, 0.004, 0.006))


def test_a_percentage_is_rounded_down_and_never_100() -> None:
    assert percent_kept(loss(0.039, 0, 0), loss(0.239, 0, 0)) == 83
    assert percent_kept(loss(0.0001, 0, 0), loss(1.0, 0, 0)) == 99
    assert percent_kept(loss(-0.01, 0, 0), loss(1.0, 0, 0)) is None
    assert percent_kept(loss(1.01, 0, 0), loss(1.0, 0, 0)) is None


def test_a_drop_has_the_interval_of_a_difference() -> None:
    found = drop(Estimate(value=0.7, low=0.6, high=0.78), Estimate(value=0.2, low=0.12, high=0.3))
    assert found.value == pytest.approx(0.5)
    assert found.low == pytest.approx(0.5 - (0.1**2 + 0.1**2) ** 0.5)
    assert found.high == pytest.approx(0.5 + (0.08**2 + 0.08**2) ** 0.5)
    # A fraction at 0 or 1 has an interval of no width.
    assert drop(Estimate(value=1, low=1, high=1), Estimate(value=0, low=0, high=0)).interval == (
        1,
        1,
    )
