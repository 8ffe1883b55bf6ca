"""The mixture is exact in every prefix, and each place in it is found without replaying."""

from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bigmix.data.mixture import Mixture, share_at, shares_at, whole_weights


def places(shares, rows, rows_per_step=64):
    return Mixture(shares, rows_per_step).rows(0, rows)


def assert_every_prefix_is_within_one_row(shares, rows, rows_per_step):
    targets = dict.fromkeys(shares, Fraction(0))
    counts = dict.fromkeys(shares, 0)
    for row, place in enumerate(places(shares, rows, rows_per_step)):
        now = {
            n: Fraction(str(round(s, 12)))
            for n, s in shares_at(shares, row // rows_per_step).items()
        }
        for name in shares:
            targets[name] += now[name]
        assert place.index == counts[place.source]
        counts[place.source] += 1
        for name in shares:
            # 2e-6 a row: the resolution of shares that move
            assert abs(counts[name] - targets[name]) < 1 + Fraction(2 * (row + 1), 10**6)


def test_three_sources_stay_within_one_row_over_a_thousand_steps():
    shares = {"web": 0.57, "chat": 0.33, "code": 0.10}
    weights = dict(zip(shares, whole_weights(list(shares.values())), strict=True))
    counts = dict.fromkeys(shares, 0)
    for row, place in enumerate(places(shares, 64_000), start=1):
        counts[place.source] += 1
        assert all(abs(100 * counts[n] - row * weights[n]) < 100 for n in shares)
    assert counts == {"web": 36480, "chat": 21120, "code": 6400}


def test_whole_weights_are_the_smallest_in_the_same_ratio():
    assert whole_weights([0.57, 0.43]) == [57, 43]
    assert whole_weights([2, 2.0, 4]) == [1, 1, 2]
    assert whole_weights([1e-5, 1]) == [1, 100000]


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(1, 1000), min_size=1, max_size=7))
def test_any_constant_shares_are_exact(weights):
    shares = {f"s{i}": w / 1000 for i, w in enumerate(weights)}
    total = sum(weights)
    counts = dict.fromkeys(shares, 0)
    for row, place in enumerate(places(shares, 600), start=1):
        counts[place.source] += 1
        for (name, count), weight in zip(counts.items(), weights, strict=True):
            assert abs(count * total - row * weight) < total, name


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.lists(st.integers(0, 100), min_size=1, max_size=4), min_size=2, max_size=5),
    st.integers(1, 16),
)
def test_any_schedule_is_exact(values, rows_per_step):
    shares = {
        f"s{i}": [(step * 9, v / 100) for step, v in enumerate(column)]
        for i, column in enumerate(values)
    } | {"always": 0.3}
    assert_every_prefix_is_within_one_row(shares, 40 * rows_per_step, rows_per_step)


@pytest.mark.parametrize(
    "shares",
    [
        {"web": 0.57, "chat": 0.33, "code": 0.1},
        {"web": [(0, 0.5), (100, 0.05)], "chat": 0.5},
        {"web": [(0, 0.5), (100, 0.0)], "chat": [(0, 0.0), (50, 1.0)], "code": 0.123456},
    ],
)
def test_a_row_is_the_same_however_it_is_reached(shares):
    everything = places(shares, 12_000)
    fresh = Mixture(shares, 64)
    for row in (11_999, 0, 5_000, 4_096, 8_191, 64):
        assert fresh.at(row) == everything[row]
    assert fresh.rows(7_000, 7_100) == everything[7_000:7_100]
    before = everything[:9_000]
    expected = {name: sum(p.source == name for p in before) for name in shares}
    assert fresh.counts(9_000) == expected


def test_a_far_row_is_found_at_once():
    mixture = Mixture({"web": 0.57, "chat": 0.33, "code": 0.1}, 64)
    far = 10**15
    assert mixture.at(far + 3).source == mixture.at(3).source
    assert sum(mixture.counts(far).values()) == far


def test_a_source_of_any_smallness_appears():
    counts = Mixture({"rare": 0.00001, "web": 0.99999}, 64).counts(1_000_000)
    assert counts == {"rare": 10, "web": 999_990}


def test_shares_between_points_lie_on_the_line():
    points = [(0, 0.0), (100, 0.5), (200, 0.1)]
    assert share_at(points, 50) == 0.25
    assert share_at(points, 150) == pytest.approx(0.3)
    assert share_at(points, 999) == 0.1
