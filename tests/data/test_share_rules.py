"""A controller's rule, what a rule of the user must do, and what decisions do to rows, budgets
and learning rates.
"""

import json
from dataclasses import replace

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from support.corpora import locate
from support.recipes import decided as with_decision
from support.recipes import opened, position, recipe_of_three, resumed

from bigmix.commands.main import main
from bigmix.data.loader import step_batch
from bigmix.data.records import Decision, RankRows
from bigmix.data.share_rules import ControllerInput, decide, rule_of
from bigmix.data.shares import apportion
from bigmix.errors import BadInput, BigmixError
from bigmix.recipe import load_recipe
from bigmix.recipe.shares import Controller
from bigmix.runs.checkpoints import Position
from bigmix.train.inputs import moving_shares
from bigmix.train.state import progress

EVERY = 5
BASE = ["sources.web.held_out=web", "sources.code.held_out=code", f"evaluate.every={EVERY}"]
HELD = [*BASE, "sources.web.share={controller: forgetting, limit: 0.02}"]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return recipe_of_three(tmp_path_factory.mktemp("controller"))


@pytest.fixture(autouse=True)
def here(data, monkeypatch):
    monkeypatch.chdir(data)
    return data


def settings_of(**changes):
    return Controller(controller="forgetting", limit=0.1, **changes)


def reading(share=0.1, forgetting=0.1, earlier=(), **changes):
    values = {
        "name": "web",
        "step": 10,
        "steps": 100,
        "share": share,
        "least": 0.01,
        "most": 0.5,
        "limit": 0.1,
        "shares": {"web": share},
        "losses": {"web": 2.0},
        "held_out": {"web": 3.0},
        "earlier": earlier,
        "forgetting": {"web": forgetting} if isinstance(forgetting, float) else forgetting,
    }
    return ControllerInput(**values | changes)


def decision(forgetting, share=0.1, step=5):
    return Decision(
        step=step, progress=step / 100, shares={"web": share}, forgetting={"web": forgetting}
    )


def decided(settings, given, watched_sets=("web",)):
    return decide(rule_of(settings, watched_sets), "forgetting", given)


@pytest.mark.parametrize("answer", [0.2, 0.5, 0.9])
@pytest.mark.parametrize(
    ("alone", "steepness", "alpha", "limit"),
    [(1.1, 60, 0.75, 0.3), (1.1, 60, 0.75, 0.15), (7, 200, 1.2, 0.3), (0.3, 30, 0.6, 0.1)],
)
@pytest.mark.parametrize("start", [0.02, 0.5])
def test_forgetting_that_answers_late_is_held_without_oscillation(
    answer, alone, steepness, alpha, limit, start
):
    """A plant that goes a part of the way to what the published law says of its share, at each
    evaluation.
    """
    settings = Controller(controller="forgetting", limit=limit, most=0.9)
    forgetting, share, earlier, seen = 0.0, start, [], []
    for step in range(1, 50):
        forgetting += answer * (alone * (1 + steepness * share) ** -alpha - forgetting)
        now = reading(share, forgetting, tuple(earlier), most=0.9, step=step)
        share = decided(settings, now)
        earlier.append(decision(forgetting, share, step))
        seen.append((forgetting, share))
    settled = seen[30:]
    assert all(0.7 * limit < value <= limit for value, _ in settled)
    shares = [share for _, share in settled]
    assert max(shares) < 1.1 * min(shares)


def test_the_share_rises_at_once_and_falls_slowly():
    assert decided(settings_of(), reading(0.1, 10.0)) == pytest.approx(0.4)
    assert decided(settings_of(), reading(0.1, -1.0)) == pytest.approx(0.05)
    assert decided(settings_of(), reading(0.4, 10.0)) == 0.5
    assert decided(settings_of(), reading(0.015, 0.0)) == 0.01


def test_at_the_aim_the_share_stays_and_a_trend_counts():
    at_aim = reading(0.1, 0.08, (decision(0.08),))
    assert decided(settings_of(), at_aim) == 0.1
    assert decided(settings_of(), replace(at_aim, earlier=(decision(0.04),))) > 0.1
    assert decided(settings_of(), replace(at_aim, earlier=(decision(0.12),))) < 0.1


def test_a_loss_that_is_not_finite_leaves_the_share():
    assert decided(settings_of(), reading(0.123, {})) == 0.123
    back = replace(decision(0.0), forgetting={})
    assert decided(settings_of(), reading(0.1, 0.08, (back,))) == 0.1


def test_the_worst_or_the_mean_of_what_is_looked_at_counts():
    given = reading(
        0.1,
        {"web": 0.16, "code": 0.0},
        (replace(decision(0.0), forgetting={"web": 0.16, "code": 0.0}),),
    )
    both = ("web", "code")
    assert decided(settings_of(judge="mean"), given, both) == 0.1
    assert decided(settings_of(judge="worst"), given, both) == pytest.approx(0.1 * 2**0.5, abs=1e-6)


RULE = """\
from __future__ import annotations
from dataclasses import dataclass
@dataclass
class Kept:
    share: float
def by_loss(reading):
    return 0.1 + 0.01 * len(reading.earlier) + reading.losses["web"] / 100
calls = []
def remembers(reading):
    calls.append(1)
    return 0.1 + 0.01 * len(calls)
def says(reading):
    return "a lot"
def too_much(reading):
    return 0.7
def fails(reading):
    return reading.losses["absent"]
"""


@pytest.fixture
def rule(tmp_path, monkeypatch):
    (tmp_path / "rules_of_mine.py").write_text(RULE)
    monkeypatch.syspath_prepend(tmp_path)
    return str(tmp_path / "rules_of_mine.py")


@pytest.mark.parametrize("as_module", [True, False])
def test_a_rule_of_ones_own_decides_by_what_it_is_given(rule, as_module):
    place = "rules_of_mine" if as_module else rule
    own = rule_of(Controller(controller=f"{place}:by_loss"), ("web",))
    assert decide(own, "mine", reading(earlier=(decision(0.0),))) == pytest.approx(0.13)


@pytest.mark.parametrize(
    ("function", "message"),
    [
        ("remembers", "must depend on what it is given alone"),
        ("says", "'a lot' for the share of web after step 10, must be a finite number"),
        (
            "too_much",
            (
                "gives 0.7 for the share of web after step 10, must be between least = 0.01 and"
                " most = 0.5"
            ),
        ),
        ("fails", "failed on the share of web after step 10: KeyError: 'absent'"),
    ],
)
def test_a_rule_that_cannot_be_followed_is_named(rule, function, message):
    own = rule_of(Controller(controller=f"{rule}:{function}"), ("web",))
    with pytest.raises(BigmixError, match=message.replace("(", r"\(")):
        decide(own, "mine", reading())


def faults(*overrides):
    with pytest.raises(BadInput) as caught:
        opened(*overrides)
    return caught.value.faults


TABLE = "sources.web.share={controller: forgetting, limit: 0.02"


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            [f"{TABLE}}}", "evaluate.every=0"],
            "evaluate.every is 0; set evaluate.every=50",
        ),
        (
            [f"{TABLE}}}", "sources.web.held_out=null", "sources.code.held_out=null"],
            "no replay source has a held-out set",
        ),
        (
            [f"{TABLE}, held_out: [moon]}}"],
            "held_out names moon; known held-out sets are: web, code",
        ),
        (
            [f"{TABLE}, start: 0.6}}"],
            "least 0.01, start 0.6 and most 0.5; they must not fall in this order",
        ),
        ([f"{TABLE}, start: [[0, 0.1]]}}"], "sources.web.share.start is [[0, 0.1]]"),
        ([f"{TABLE}, limt: 3}}"], "did you mean limit?"),
        (["sources.web.share={controller: forgetting}"], "sources.web.share.limit is missing"),
        (
            ["sources.web.share={controller: forgeting, limit: 1}"],
            "it must be forgetting, or a rule of your own",
        ),
        (
            [f"sources.chat.share={TABLE[18:]}}}"],
            "chat is a task source; put the controller on replay",
        ),
        (
            [f"{TABLE}}}", f"sources.code.share={TABLE[18:]}}}"],
            "together they may reach 1 of the rows outside of groups",
        ),
        (
            [f"{TABLE}}}", "groups={old: {share: 1}}", "sources.web.group=old"],
            "all shares in group old have a controller",
        ),
        (["sources.web.share={controller: 'no.py:rule'}"], "no.py cannot be imported"),
        (["sources.web.share={controller: 'math:rule'}"], "math has no function rule"),
        (
            [f"{TABLE}}}", "sources.web.loss_share={controller: forgetting}"],
            "sources.web.loss_share is a table",
        ),
    ],
)
def test_a_controller_that_cannot_work_is_refused_before_the_run(overrides, message):
    assert any(message in fault for fault in faults(*BASE, *overrides))


def after(recipe, inputs, step, shares, earlier=()):
    """The inputs after a decision on shares, and the position of the run then."""
    now = Decision(step=step, progress=0.5, shares=shares, forgetting={})
    source_positions = replace(position(recipe, inputs, step), decisions=(*earlier, now))
    return with_decision(inputs, recipe, source_positions), source_positions


def rows_of(inputs, first, last):
    return [
        {n: sum(i.source == n for i in inputs.plan.row_ids(k)) for n in inputs.plan.mixture.names}
        for k in range(first, last + 1)
    ]


def test_a_decided_share_is_a_fraction_and_the_others_divide_the_rest_in_their_ratio():
    recipe, inputs = opened(*HELD)
    assert inputs.plan.shares_of_step(1).rows == pytest.approx(
        {"web": 0.25, "code": 0.25, "chat": 0.5}
    )
    later, _ = after(recipe, inputs, EVERY, {"web": 0.4})
    for shares in (
        later.plan.shares_of_step(EVERY + 1).rows,
        later.plan.shares_of_step(EVERY + 1).loss,
    ):
        assert shares == pytest.approx({"web": 0.4, "code": 0.2, "chat": 0.4})


def test_a_group_is_controlled_as_a_whole_and_loss_shares_stay_apart():
    group = [
        "groups={old: {share: {controller: forgetting, limit: 0.02}}}",
        "sources.web.group=old",
        "sources.code.group=old",
    ]
    recipe, inputs = opened(
        *BASE, *group, "sources.web.share=3", "sources.code.share=1", "sources.chat.loss_share=0.5"
    )
    later, _ = after(recipe, inputs, EVERY, {"old": 0.4})
    assert later.plan.shares_of_step(9).rows == pytest.approx(
        {"web": 0.3, "code": 0.1, "chat": 0.6}
    )
    recipe, inputs = opened(*HELD, "sources.web.loss_share=1")
    later, _ = after(recipe, inputs, EVERY, {"web": 0.4})
    assert later.plan.shares_of_step(9).loss == pytest.approx(
        {"web": 4 / 7, "code": 1 / 7, "chat": 2 / 7}
    )


def test_two_controllers_side_by_side_leave_the_rest_to_the_others():
    two = [
        f"sources.{n}.share={{controller: forgetting, limit: 0.02, most: 0.4}}"
        for n in ("web", "code")
    ]
    recipe, inputs = opened(*BASE, *two)
    later, _ = after(recipe, inputs, EVERY, {"web": 0.2, "code": 0.05})
    assert later.plan.shares_of_step(9).rows == pytest.approx(
        {"web": 0.2, "code": 0.05, "chat": 0.75}
    )


def test_small_shares_are_met_over_many_decisions_and_each_row_comes_in_its_turn():
    """With shares below a row per decision, rows that each decision rounds away would never
    come.
    """
    recipe, inputs = opened(
        *HELD, "sources.code.share=0.02", "sources.chat.share=1", "budget.steps=200"
    )
    source_positions, due = position(recipe, inputs, 0), dict.fromkeys(recipe.sources, 0.0)
    drawn = {name: [] for name in recipe.sources}
    for number in range(1, 31):
        step = number * EVERY
        for k in range(step - EVERY + 1, step + 1):
            for name, share in inputs.plan.shares_of_step(k).rows.items():
                due[name] += 8 * share
            for row in inputs.plan.row_ids(k):
                drawn[row.source].append(row)
        for name, rows in drawn.items():
            assert abs(len(rows) - due[name]) <= 1 + 1e-6, (name, step)
        counts = {name: len(rows) for name, rows in drawn.items()}
        assert {n: s.row for n, s in inputs.plan.source_positions(step).items()} == counts
        share = 0.013 if number % 3 else 0.3
        inputs, source_positions = after(
            recipe, inputs, step, {"web": share}, source_positions.decisions
        )
    for name, rows in drawn.items():
        stream = inputs.plan.streams[name]
        assert sorted(map(str, rows)) == sorted(str(locate(stream, n)) for n in range(len(rows)))


def test_rows_since_a_decision_are_exact_in_every_prefix():
    recipe, inputs = opened(*HELD, "rows_per_step=7", "train.micro_batch_rows=1")
    later, _ = after(recipe, inputs, EVERY, {"web": 0.137})
    rows = rows_of(later, EVERY + 1, 2 * EVERY)
    for name in recipe.sources:
        whole = sum(row[name] for row in rows)
        assert abs(whole - 35 * later.plan.shares_of_step(EVERY + 1).rows[name]) < 2
        for count in range(1, EVERY + 1):
            assert abs(sum(row[name] for row in rows[:count]) - whole * count / EVERY) < 1


def test_a_checkpoint_brings_the_decided_rows_back():
    recipe, inputs = opened(*HELD, "budget={task_tokens: 9000}")
    later, source_positions = after(recipe, inputs, EVERY, {"web": 0.4})
    saved = replace(position(recipe, later, 8), decisions=source_positions.decisions)
    read = Position.from_json(json.loads(json.dumps(saved.to_json())))
    assert (
        read.decisions[0] == source_positions.decisions[0]
        and read.data.segment == later.plan.segment
    )
    back = resumed(opened(*HELD, "budget={task_tokens: 9000}")[1], recipe, read, new_segment=False)
    assert back.plan.steps == later.plan.steps > inputs.plan.steps
    for step in range(9, back.plan.steps + 1):
        assert back.plan.row_ids(step) == later.plan.row_ids(step)


def test_checkpoints_without_decisions_are_read():
    recipe, inputs = opened()
    old = position(recipe, inputs).to_json()
    del old["decisions"], old["chapter"]["shares"], old["chapter"]["owed"]
    assert Position.from_json(old).decisions == []


def test_a_changed_recipe_keeps_the_decided_share():
    recipe, inputs = opened(*HELD)
    later, source_positions = after(recipe, inputs, EVERY, {"web": 0.4})
    changed, fresh = opened(*HELD, "sources.chat.share=0.25")
    saved = replace(position(recipe, later, 8), decisions=source_positions.decisions)
    going_on = resumed(fresh, changed, saved, new_segment=True)
    assert going_on.plan.shares_of_step(9).rows == pytest.approx(
        {"web": 0.4, "code": 0.3, "chat": 0.3}
    )


def test_a_share_that_a_source_has_no_rows_for_is_refused_at_its_decision():
    limits = ["sources.web.max_epochs=1", "budget.steps=30"]
    recipe, inputs = opened(*HELD, *limits)
    assert after(recipe, inputs, EVERY, {"web": 0.1})[0].plan.steps == 30
    with pytest.raises(BadInput, match=r"sources\.web\.max_epochs is 1"):
        after(recipe, inputs, EVERY, {"web": 0.5})


def test_a_budget_of_task_tokens_has_more_steps_where_the_share_rises():
    budget = "budget={task_tokens: 9000}"
    recipe, inputs = opened(*HELD, budget)
    later, _ = after(recipe, inputs, EVERY, {"web": 0.5})
    rank_rows = RankRows(rank=0, ranks=1, rows_per_step=8, micro_batch_rows=2)
    tokens = sum(step_batch(inputs.plan, rank_rows, k).tokens["chat"] for k in range(1, EVERY + 1))
    tokens += sum(
        step_batch(later.plan, rank_rows, k).tokens["chat"]
        for k in range(EVERY + 1, later.plan.steps + 1)
    )
    assert inputs.plan.steps < later.plan.steps == pytest.approx(1.5 * inputs.plan.steps, rel=0.2)
    assert tokens == pytest.approx(9000, abs=600)


@given(st.lists(st.tuples(st.integers(1, 30), st.integers(1, 300)), max_size=6))
def test_progress_is_continuous_grows_and_ends_at_one(changes):
    """At a decision the number of steps changes; the part that is done does not."""
    steps, at, decisions = 100, 0, []
    for further, left in changes:
        if at + further >= steps:
            break
        before = progress(at, steps, decisions)
        at += further
        done = progress(at, steps, decisions)
        assert before < done < 1
        decisions.append(Decision(step=at, progress=done, shares={}, forgetting={}))
        steps = at + left
        assert progress(at, steps, decisions) == done
    assert progress(steps, steps, decisions) == pytest.approx(1)
    if not decisions:
        assert progress(7, steps, decisions) == 7 / steps


@example([-0.5, -0.75, -0.75, 0.0])
@given(st.lists(st.floats(-0.99, 40), min_size=1, max_size=8))
def test_what_is_due_becomes_whole_rows_with_the_same_sum(due):
    total = max(1, round(sum(due)))
    due[-1] += total - sum(due)
    rows = apportion({str(n): value for n, value in enumerate(due)}, total)
    assert sum(rows.values()) == total and min(rows.values()) >= 0
    if min(due) >= 0:
        assert all(abs(rows[str(n)] - value) < 1 + 1e-9 for n, value in enumerate(due))


def test_that_a_share_moves_is_reported_before_the_run(capsys):
    (note,) = moving_shares(load_recipe("recipe.yaml", HELD))
    assert "the share of web begins at 0.25 and moves between 0.01 and 0.5" in note
    assert note in opened(*HELD)[1].notes and opened()[1].notes == []
    assert main(["rows", "recipe.yaml", *HELD, "--step", "1"]) == 0
    output = capsys.readouterr()
    assert note in output.err and len(output.out.splitlines()) == 8
