"""The mixture is exact in every prefix, and each place in it is found without replaying."""

from bisect import bisect_right
from fractions import Fraction
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bigmix.data.mixture import Mixture
from bigmix.data.shares import ShareMember, Shares, shares_of, whole_weights


def places(shares, rows, rows_per_step=64):
    mixture = Mixture(shares, rows_per_step)
    found = mixture.rows(0, rows)
    names = [mixture.names[source] for source in found.sources_R]
    return list(zip(names, found.indices_R.tolist(), strict=True))


def source_and_index(mixture, row):
    """The source that a row of the run is drawn from, and which of its rows it is."""
    found = mixture.rows(row, row + 1)
    return mixture.names[found.sources_R[0]], int(found.indices_R[0])


def assert_every_prefix_is_within_one_row(shares, rows, rows_per_step):
    """The targets added up row by row, in fractions, from the shares as they were given."""
    shares = shares if isinstance(shares, Shares) else shares_of(shares)
    targets = dict.fromkeys(shares.names, Fraction(0))
    counts = dict.fromkeys(shares.names, 0)
    for row, (source, index) in enumerate(places(shares, rows, rows_per_step)):
        if row % rows_per_step == 0:
            now = shares.at(row // rows_per_step)
            now = {name: Fraction(str(round(share, 12))) for name, share in now.items()}
        for name in shares.names:
            targets[name] += now[name]
        assert index == counts[source]
        counts[source] += 1
        for name in shares.names:
            # 2e-6 a row: the resolution of shares that move
            assert abs(counts[name] - targets[name]) < 1 + Fraction(2 * (row + 1), 10**6)


def test_three_sources_stay_within_one_row_over_a_thousand_steps():
    shares = {"web": 0.57, "chat": 0.33, "code": 0.10}
    weights = dict(zip(shares, whole_weights(list(shares.values())), strict=True))
    counts = dict.fromkeys(shares, 0)
    for row, (source, _) in enumerate(places(shares, 64_000), start=1):
        counts[source] += 1
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
    for row, (source, _) in enumerate(places(shares, 600), start=1):
        counts[source] += 1
        for (name, count), weight in zip(counts.items(), weights, strict=True):
            assert abs(count * total - row * weight) < total, name


SCHEDULES = st.lists(
    st.lists(st.integers(0, 100), min_size=1, max_size=4), min_size=2, max_size=5
).map(
    lambda values: (
        {
            f"s{i}": [(step * 9, v / 100) for step, v in enumerate(column)]
            for i, column in enumerate(values)
        }
        | {"always": 0.3}
    )
)


@settings(max_examples=40, deadline=None)
@given(SCHEDULES, st.integers(1, 16))
def test_any_schedule_is_exact(shares, rows_per_step):
    assert_every_prefix_is_within_one_row(shares, 40 * rows_per_step, rows_per_step)


@settings(max_examples=40, deadline=None)
@given(
    st.lists(
        st.tuples(st.integers(1, 100), st.sampled_from([None, "a", "b", "c"])),
        min_size=1,
        max_size=6,
    ),
    st.integers(1, 100),
    st.integers(0, 12),
)
def test_any_groups_and_ends_are_exact(given_sources, group_share, end):
    sources = {
        f"s{i}": ShareMember(share=share / 100, group=group)
        for i, (share, group) in enumerate(given_sources)
    }
    sources["always"] = ShareMember(share=0.2)
    groups = {
        "a": ShareMember(share=group_share / 100),
        "b": ShareMember(share=0.5, group="a"),
        "c": ShareMember(share=[(0, 0.1), (20, 0.9)]),
    }
    ends = {"s0": end} if end else {}
    shares = Shares(sources=sources, groups=groups, ends=ends)
    assert sum(shares.at(3).values()) == pytest.approx(1)
    assert_every_prefix_is_within_one_row(shares, 200, 8)


def test_the_members_of_a_group_divide_its_share():
    shares = Shares(
        sources={
            "web": ShareMember(share=3, group="replay"),
            "code": ShareMember(share=1, group="replay"),
            "old": ShareMember(share=1, group="rest"),
            "older": ShareMember(share=1, group="rest"),
            "task": ShareMember(share=0.8),
        },
        groups={"replay": ShareMember(share=0.2), "rest": ShareMember(share=4, group="replay")},
    )
    found = {"web": 0.075, "code": 0.025, "old": 0.05, "older": 0.05, "task": 0.8}
    assert shares.at(0) == pytest.approx(found)
    exact = shares.exact()
    assert exact["web"] == Fraction(3, 40) and sum(exact.values()) == 1
    counts = Mixture(shares, 64).counts(4000)
    assert counts == {name: 4000 * share for name, share in found.items()}


def test_a_source_that_has_ended_leaves_its_share_to_the_others():
    shares = Shares(
        sources={n: ShareMember(share=s) for n, s in {"a": 0.5, "b": 0.3, "c": 0.2}.items()},
        ends={"a": 10},
    )
    mixture = Mixture(shares, 10)
    assert mixture.counts(100) == {"a": 50, "b": 30, "c": 20}
    assert mixture.counts(1100) == {"a": 50, "b": 630, "c": 420}


MOVING = [
    {"web": 0.57, "chat": 0.33, "code": 0.1},
    {"web": 0.123456789, "chat": 0.987654321, "code": 0.31415926},
    {"web": [(0, 0.5), (100, 0.05)], "chat": 0.5},
    {"web": [(0, 0.5), (100, 0.0)], "chat": [(0, 0.0), (50, 1.0)], "code": 0.123456},
    {"web": [(0, 0.4), (20, 0.0)], "chat": 0.3, "code": [(0, 0.2), (30, 0.0)], "law": 0.7},
    {"web": [(0, 0.4), (20, 0.0), (120, 0.0), (150, 0.3)], "chat": 0.3, "code": 0.01},
]


@pytest.mark.parametrize("shares", MOVING)
def test_a_row_is_the_same_however_it_is_reached(shares):
    everything = places(shares, 30_000)
    for row in (29_999, 0, 5_000, 4_096, 8_191, 64, 12_287, 20_001):
        assert source_and_index(Mixture(shares, 64), row) == everything[row]
    fresh = Mixture(shares, 64)
    for start, stop in ((7_000, 7_100), (1_000, 9_000), (29_000, 30_000)):
        found = fresh.rows(start, stop)
        assert [fresh.names[s] for s in found.sources_R] == [n for n, _ in everything[start:stop]]
        assert found.indices_R.tolist() == [i for _, i in everything[start:stop]]
    expected = {name: sum(n == name for n, _ in everything[:9_000]) for name in shares}
    assert fresh.counts(9_000) == expected


@settings(max_examples=40, deadline=None)
@given(SCHEDULES, st.integers(1, 16), st.lists(st.integers(0, 3000), min_size=1, max_size=5))
def test_any_far_row_equals_that_of_giving_the_rows_away_one_by_one(shares, rows_per_step, rows):
    mixture = Mixture(shares, rows_per_step)
    _, given_rows = mixture._run([0] * len(mixture.names), 0, 3001)
    for row in rows:
        source, _ = source_and_index(Mixture(shares, rows_per_step), row)
        assert mixture.names.index(source) == given_rows[row]
        expected = [given_rows[:row].count(source) for source in range(len(mixture.names))]
        assert list(mixture.counts(row).values()) == expected


def test_a_far_row_is_found_at_once():
    mixture = Mixture({"web": 0.57, "chat": 0.33, "code": 0.1}, 64)
    far = 10**15
    assert source_and_index(mixture, far + 3)[0] == source_and_index(mixture, 3)[0]
    assert sum(mixture.counts(far).values()) == far


def test_far_rows_of_crooked_shares_stay_within_one_row():
    shares = {"web": 0.123456789, "chat": 0.987654321, "code": 0.31415926}
    mixture, total = Mixture(shares, 64), sum(Fraction(str(s)) for s in shares.values())
    for row in (10**9 + 7, 10**12 + 1, 10**15 + 11):
        for name, count in mixture.counts(row).items():
            assert abs(count - row * Fraction(str(shares[name])) / total) < 1


def test_a_source_of_any_smallness_appears():
    counts = Mixture({"rare": 0.00001, "web": 0.99999}, 64).counts(1_000_000)
    assert counts == {"rare": 10, "web": 999_990}


def share_at(points, step):
    """Points joined by straight lines, one step at a time; the last value holds after the end."""
    index = bisect_right([at for at, _ in points], step) - 1
    at, value = points[index]
    if index + 1 == len(points):
        return value
    next_at, next_value = points[index + 1]
    return value + (next_value - value) * (step - at) / (next_at - at)


def test_shares_between_points_lie_on_the_line():
    points = [(0, 0.0), (100, 0.5), (200, 0.1)]
    assert share_at(points, 50) == 0.25
    assert share_at(points, 150) == pytest.approx(0.3)
    assert share_at(points, 999) == 0.1
    steps = np.arange(0, 300, 7)
    table = shares_of({"a": points, "b": 0.5}).table(steps)["a"]
    expected = [share_at(points, s) / (share_at(points, s) + 0.5) for s in steps.tolist()]
    assert table.tolist() == pytest.approx(expected)


def test_equal_neighbours_of_a_schedule_are_one_piece():
    weights = shares_of({"a": [(0, 0.5), (1000, 0.5), (1010, 0.1)], "b": 0.5}).weights()
    assert len(weights.first_steps) == 11
    assert all(sum(piece) == weights.unit for piece in weights.weights)
    assert all(later > earlier for earlier, later in pairwise(weights.first_steps))
