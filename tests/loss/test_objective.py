"""A source's loss share is its weight in the gradient, in each step and over the run."""

import random

import pytest

from bigmix.data.mixture import Mixture
from bigmix.loss.objective import per_source, per_token, source_weights

SHARES = {"web": 0.2, "chat": 0.8}


def test_per_source_a_share_is_the_weight_whatever_the_counts():
    weights = per_source(SHARES, {"web": 9_000, "chat": 10})
    assert weights.gradient == SHARES
    assert weights.token == {"web": 0.2 / 9_000, "chat": 0.08}


def test_per_token_is_the_mean_over_all_loss_tokens():
    weights = per_token(SHARES, SHARES, {"web": 90, "chat": 10})
    assert weights.token == {"web": 0.01, "chat": 0.01}
    assert weights.gradient == pytest.approx({"web": 0.9, "chat": 0.1})


def test_per_token_weighs_by_loss_share_over_share():
    weights = per_token(SHARES, {"web": 0.4, "chat": 0.6}, {"web": 50, "chat": 50})
    assert weights.token["web"] / weights.token["chat"] == pytest.approx((0.4 / 0.2) / (0.6 / 0.8))
    assert sum(weights.gradient.values()) == pytest.approx(1)


@pytest.mark.parametrize("weigh", [per_source, lambda s, n: per_token(SHARES, s, n)])
def test_a_step_without_loss_tokens_weighs_nothing(weigh):
    weights = weigh(SHARES, {"web": 0, "chat": 0})
    assert weights.token == weights.gradient == {"web": 0, "chat": 0}


def weights_over_a_run(shares, loss, rows_per_step, steps):
    """The sum of each source's weights, and whether any step had none of its rows."""
    mixture = Mixture(shares, rows_per_step)
    total, misses = dict.fromkeys(shares, 0.0), dict.fromkeys(shares, False)
    for step in range(steps):
        before, after = (mixture.counts(k * rows_per_step) for k in (step, step + 1))
        num_rows = {name: after[name] - before[name] for name in shares}
        weights = source_weights(shares, loss, num_rows, rows_per_step)
        for name in shares:
            total[name] += weights[name] if num_rows[name] else 0.0
            misses[name] |= num_rows[name] == 0
    return {name: sum_ / steps for name, sum_ in total.items()}, misses


@pytest.mark.parametrize(
    ("shares", "rows_per_step"),
    [
        ({"a": 0.07, "docs": 0.9, "c": 0.03}, 16),  # 1.12, 14.4 and 0.48 rows a step
        ({"a": 0.38, "b": 0.08, "c": 0.51, "d": 0.03}, 16),
    ],
)
def test_of_three_sources_one_that_misses_a_step_has_its_share_all_the_same(shares, rows_per_step):
    found, misses = weights_over_a_run(shares, shares, rows_per_step, 2_000)
    due_often = [n for n, share in shares.items() if 1 <= share * rows_per_step < 2]
    assert any(misses[name] for name in due_often)
    assert found == pytest.approx(shares, rel=2e-3)


def test_where_every_step_has_a_source_it_weighs_its_share_in_each():
    """From one row a step on with two sources, from two on with more, for any shares."""
    draw = random.Random(0)
    for _ in range(60):
        rows_per_step, num_sources = draw.choice([4, 8, 15, 32]), draw.choice([2, 3, 5])
        min_rows = 1 if num_sources == 2 else 2
        sizes = [draw.random() for _ in range(num_sources)]
        shares = {str(n): size / sum(sizes) for n, size in enumerate(sizes)}
        _, misses = weights_over_a_run(shares, shares, rows_per_step, 300)
        sure = {n for n, share in shares.items() if share * rows_per_step >= min_rows}
        assert not any(misses[name] for name in sure), (shares, rows_per_step)
        weights = source_weights(shares, shares, dict.fromkeys(shares, 1), rows_per_step)
        assert all(weights[name] == shares[name] for name in sure)


def test_a_source_below_one_row_a_step_has_its_share_of_the_gradient_over_the_run():
    shares, loss, rows_per_step, steps = (
        {"rare": 0.03, "web": 0.97},
        {"rare": 0.1, "web": 0.9},
        8,
        1000,
    )
    mixture = Mixture(shares, rows_per_step)
    total = dict.fromkeys(shares, 0.0)
    for step in range(steps):
        before, after = (mixture.counts(k * rows_per_step) for k in (step, step + 1))
        num_rows = {name: after[name] - before[name] for name in shares}
        for name, weight in source_weights(shares, loss, num_rows, rows_per_step).items():
            total[name] += weight
    assert total["rare"] / steps == pytest.approx(0.1, rel=0.01)
    assert total["web"] / steps == pytest.approx(0.9)
