"""Shares by UniMax: as even as the epochs of each source allow, for the budget of the run."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.recipes import opened, position, recipe_of_three, resumed

from bigmix.data.shares import unimax
from bigmix.errors import BadInput

GROUP = ["groups={old: {share: 1}}", "sources.web.group=old", "sources.code.group=old"]


def of(epochs):
    return [f"sources.{name}.share={{unimax: {epochs}}}" for name in ("web", "code")]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return recipe_of_three(tmp_path_factory.mktemp("unimax"))


@pytest.fixture(autouse=True)
def here(data, monkeypatch):
    monkeypatch.chdir(data)


def row_by_row(capacities, rows):
    """The slow, obvious way: each row comes from the source that has given least, of those with a
    row left.
    """
    given = dict.fromkeys(capacities, 0)
    for _ in range(rows):
        able = [name for name in given if given[name] < capacities[name]]
        if not able:
            break
        given[min(able, key=lambda name: given[name])] += 1
    return given


@given(
    st.dictionaries(st.text(max_size=3), st.integers(0, 60), min_size=1, max_size=6),
    st.integers(0, 200),
)
def test_rows_are_divided_as_one_by_one(capacities, rows):
    fast, slow = unimax(capacities, rows), row_by_row(capacities, rows)
    assert sum(fast.values()) == sum(slow.values()) == min(rows, sum(capacities.values()))
    assert all(abs(fast[name] - slow[name]) <= 1 for name in slow)
    assert all(fast[name] <= capacity for name, capacity in capacities.items())


@pytest.mark.parametrize("epochs", [0.9, 1, 1.2, 2, 4])
def test_a_small_source_gives_its_epochs_and_the_others_the_rest_evenly(epochs):
    inputs = opened(*GROUP, *of(epochs), "budget.steps=12")[1]
    of_epoch = {name: inputs.plan.streams[name].rows_per_epoch for name in ("web", "code")}
    drawn, rows = inputs.plan.counts(12), 12 * 8 * 2 // 3
    slow = row_by_row({name: int(epochs * count) for name, count in of_epoch.items()}, rows)
    for name, count in slow.items():
        assert abs(drawn[name] - count) <= 1 and inputs.plan.epochs(12)[name] <= epochs


def test_with_room_enough_shares_are_even():
    inputs = opened(*GROUP, *of(1000), "budget.steps=24")[1]
    assert inputs.plan.shares_of_step(1).rows == pytest.approx(
        {"web": 1 / 3, "code": 1 / 3, "chat": 1 / 3}, abs=0.01
    )


@pytest.mark.parametrize("budget", ["{total_tokens: 12000}", "{task_tokens: 5000}", "{steps: 40}"])
@pytest.mark.parametrize("lengths", ["64", "[[0, 32], [9, 64]]"])
def test_no_source_passes_its_epochs_under_any_budget(budget, lengths):
    more = [
        f"budget={budget}",
        f"sequence_length={lengths}",
        "groups.old.share=[[0, 1], [20, 0.3]]",
    ]
    inputs = opened(*GROUP, *of(3), *more)[1]
    epochs = inputs.plan.epochs(inputs.plan.steps)
    assert epochs["code"] <= 3 and epochs["web"] <= 3
    drawn = inputs.plan.counts(inputs.plan.steps)
    assert epochs["code"] > 2.5 or abs(drawn["web"] - drawn["code"]) <= 2


def test_what_the_epochs_cannot_give_is_refused():
    with pytest.raises(
        BadInput, match="unimax lets these sources give .* rows together, and the run needs"
    ):
        opened(*GROUP, *of(0.5), "budget.steps=100")


def test_unimax_is_only_allowed_next_to_the_same_unimax():
    with pytest.raises(BadInput, match="must have the same one; put these sources into a group"):
        opened("sources.web.share={unimax: 2}")


def test_after_a_change_the_epochs_that_are_left_are_divided():
    recipe, before = opened(*GROUP, *of(3), "budget.steps=30")
    new, inputs = opened(*GROUP, *of(3), "budget.steps=30", "sources.chat.share=0.8")
    after = resumed(inputs, new, position(recipe, before, 15), new_segment=True)
    epochs = after.plan.epochs(30)
    assert 2.8 < epochs["code"] <= 3 and epochs["web"] <= 3
