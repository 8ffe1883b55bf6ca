"""A run goes on with another recipe: every row before the change stays, every source goes on with
its next row.
"""

import json

import pytest
from support.corpora import locate, write_source
from support.recipes import AT, opened, position, recipe_of_three, resumed
from support.runs import end, lines, start

from bigmix.cluster.collectives import Cluster
from bigmix.cluster.world import World
from bigmix.data.loader import step_batch
from bigmix.data.records import RankRows
from bigmix.errors import BadInput
from bigmix.recipe import load_recipe
from bigmix.runs.checkpoints import CheckpointManifest, publish
from bigmix.runs.resume import RecipeChange, find_resume_point, keep_changes, write_recipe
from bigmix.train.inputs import open_inputs

ONE = Cluster(World(rank=0, local_rank=0, size=1, local_size=1))


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return recipe_of_three(tmp_path_factory.mktemp("segments"))


@pytest.fixture(autouse=True)
def here(data, monkeypatch):
    monkeypatch.chdir(data)


def changed(overrides, *more, step=AT):
    """What is trained after `step` steps of a recipe and then with further overrides; and what was
    trained before.
    """
    old, before = opened(*overrides)
    new, inputs = opened(*overrides, *more)
    return before, resumed(inputs, new, position(old, before, step), new_segment=True)


def drawn(inputs, name, first, last):
    """The rows of a source in steps, in the order of its stream."""
    found = [i for k in range(first, last + 1) for i in inputs.plan.row_ids(k) if i.source == name]
    stream = inputs.plan.streams[name]
    count = stream.rows_per_epoch
    epochs = {row.epoch for row in found}
    of_epochs = (n for epoch in epochs for n in range(epoch * count, (epoch + 1) * count))
    places = {locate(stream, n): n for n in of_epochs}
    return sorted(found, key=places.__getitem__)


def test_without_a_change_the_rest_is_the_rest():
    recipe, inputs = opened("sources.web.share=[[0, 0.1], [20, 0.9]]")
    going_on = resumed(inputs, recipe, position(recipe, inputs), new_segment=False)
    for step in range(AT + 1, 21):
        assert going_on.plan.row_ids(step) == inputs.plan.row_ids(step)


@pytest.mark.parametrize(
    "more",
    [
        pytest.param("sources.web.share=2", marks=pytest.mark.slow),
        "sources.web.share=[[0, 0.1], [30, 4]]",
    ],
)
def test_with_other_shares_each_source_goes_on_with_its_next_row(more):
    before, after = changed([], more)
    for name in ("web", "code", "chat"):
        stream = before.plan.streams[name]
        old, new = drawn(before, name, 1, AT), drawn(after, name, AT + 1, AT + 9)
        assert [*old, *new] == [locate(stream, n) for n in range(len(old) + len(new))]
    shares = [after.plan.shares_of_step(step).rows for step in range(AT + 1, AT + 10)]
    for count in range(1, 10):
        rows = {n: len(drawn(after, n, AT + 1, AT + count)) for n in shares[0]}
        for name, number in rows.items():
            assert abs(number - 8 * sum(s[name] for s in shares[:count])) < 1


def test_points_of_a_schedule_count_the_steps_of_the_run():
    _, after = changed([], "sources.web.share=[[0, 0], [10, 1], [20, 1]]")
    fresh = opened("sources.web.share=[[0, 0], [10, 1], [20, 1]]")[1]
    for step in range(AT + 1, 21):
        mine, wanted = after.plan.shares_of_step(step).rows, fresh.plan.shares_of_step(step).rows
        assert mine == pytest.approx(wanted)


def test_a_source_that_joins_begins_and_one_that_leaves_changes_nothing_for_others():
    joins = "sources.more={path: more, role: replay, share: 0.5}"
    _, after = changed([], joins)
    stream = after.plan.streams["more"]
    new = drawn(after, "more", AT + 1, AT + 5)
    assert new == [locate(stream, n) for n in range(len(new))] and len(new) > 8
    recipe = load_recipe("recipe.yaml")
    left = recipe.model_copy(
        update={"sources": {n: s for n, s in recipe.sources.items() if n != "code"}}
    )
    old, inputs = opened()
    rest = open_inputs(left, ranks=1, verify=False)
    rest = resumed(rest, left, position(old, inputs), new_segment=True)
    assert set(rest.plan.counts(AT + 1)) == {"web", "chat"}
    web = drawn(rest, "web", AT + 1, AT + 4)
    begin = len(drawn(inputs, "web", 1, AT))
    assert web == [locate(rest.plan.streams["web"], begin + n) for n in range(len(web))]


def test_with_longer_rows_each_source_goes_on_at_the_same_fraction_of_its_epoch():
    before, after = changed(["sequence_length=32"], "sequence_length=64")
    for name, epoch in before.plan.epochs(AT).items():
        of = after.plan.streams[name].rows_per_epoch
        assert 0 <= after.plan.source_positions(AT)[name].row / of - epoch < 1 / of


def test_a_budget_counts_what_was_trained_before():
    budget = "budget={task_tokens: 3000}"
    _, plain_run = opened(budget)
    _, after = changed([budget], "sources.chat.share=1.5")
    old, inputs = opened(budget)
    done = position(old, inputs).trained_tokens["chat"]
    assert AT < after.plan.steps < plain_run.plan.steps
    tokens = done
    rank_rows = RankRows(rank=0, ranks=1, rows_per_step=8, micro_batch_rows=2)
    for step in range(AT + 1, after.plan.steps + 1):
        tokens += step_batch(after.plan, rank_rows, step).tokens["chat"]
    assert abs(tokens - 3000) < 400


def test_a_budget_that_is_reached_already_ends_the_run():
    _, after = changed(["budget={task_tokens: 3000}"], "budget.task_tokens=100")
    assert after.plan.steps == AT


def test_epochs_before_the_change_count_for_a_limit():
    limit = ["sources.code.max_epochs=2", "sources.code.when_exhausted=renormalise"]
    before, after = changed([], *limit)
    assert any("code is left out" in note for note in after.plan.notes)
    assert before.plan.epochs(AT)["code"] < after.plan.epochs(after.plan.steps)["code"] <= 2


def test_a_run_may_change_twice():
    old, before = opened()
    middle, second = opened("sources.web.share=1")
    second = resumed(second, middle, position(old, before), new_segment=True)
    new, third = opened("sources.web.share=0.1")
    third = resumed(third, new, position(middle, second, 12), new_segment=True)
    rows = [
        *drawn(before, "web", 1, AT),
        *drawn(second, "web", AT + 1, 12),
        *drawn(third, "web", 13, 18),
    ]
    assert rows == [locate(before.plan.streams["web"], n) for n in range(len(rows))]
    again = resumed(third, new, position(new, third, 15), new_segment=False)
    assert all(again.plan.row_ids(k) == third.plan.row_ids(k) for k in range(16, 21))


def checkpoint_of(folder, recipe, inputs):
    """A checkpoint without files, which is whole."""
    temporary = folder / "checkpoints/.tmp-step-000007"
    temporary.mkdir(parents=True)
    publish(temporary, temporary.with_name("step-000007"), 1, [], position(recipe, inputs))
    write_recipe(recipe)


def begun(tmp_path, *overrides):
    recipe, inputs = opened(f"output={tmp_path}", *overrides)
    return find_resume_point(recipe, inputs.content, ONE)


@pytest.fixture
def run(tmp_path):
    recipe, inputs = opened(f"output={tmp_path}")
    checkpoint_of(tmp_path, recipe, inputs)
    return tmp_path


def test_what_speeds_a_run_up_changes_nothing(run):
    found = begun(run, "train.micro_batch_rows=4", "checkpoint.every=3", "cache.size=1G")
    assert (
        isinstance(found.checkpoint, CheckpointManifest)
        and found.step == AT
        and found.changes == ()
    )


def test_each_change_is_reported_with_its_old_and_its_new_value(run):
    joins = "sources.more={path: more, role: replay, share: 0.5}"
    found = begun(run, "train.lr=3e-3", "sources.web.share=0.5", joins)
    messages = [str(change) for change in found.changes]
    assert "sources.web.share is 0.5, it was 0.25" in messages
    assert "train.lr is 0.003, it was 0.01" in messages
    assert "sources.more.share is 0.5, it was None" in messages
    keep_changes(run, 9, found.changes)
    keep_changes(run, AT, found.changes[:1])
    kept = [json.loads(line) for line in (run / "changes.jsonl").read_text().splitlines()]
    assert [line["after_step"] for line in kept] == [AT] and set(kept[0]) > {"key", "old", "new"}


@pytest.mark.parametrize(
    ("override", "moves"),
    [
        ("sources.web.share=0.5", True),
        ("sources.web.share={temperature: 1}", True),
        ("sources.web.max_epochs=50", True),
        ("sources.more={path: more, role: replay, share: 0.5}", True),
        ("rows_per_step=16", True),
        ("sequence_length=32", True),
        ("sources.web.loss_share=0.5", False),
        ("sources.web.weigh=document", False),
        ("sources.web.held_out=more", False),
        ("train.lr=3e-3", False),
        ("train.pass_over=[9]", False),
        ("budget.steps=40", False),
        ("objective=per_token", False),
    ],
)
def test_what_leaves_the_rows_begins_no_segment(run, override, moves):
    others = ["sources.code.share={temperature: 1}", "sources.chat.share={temperature: 1}"]
    found = begun(run, override, *(others if "temperature" in override else []))
    assert found.changes and any(change.moves_rows for change in found.changes) == moves


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("model.config.hidden_size=64", "model.config.hidden_size is 64, and the run in"),
        ("seed=3", "seed is 3, and the run in"),
        ("sources.web.path=more", "sources.web.path: the shards in more are not those of web"),
        ("checkpoint.resume=never", "checkpoint.resume is never"),
    ],
)
def test_what_has_no_meaning_for_a_run_is_refused(run, override, message):
    with pytest.raises(BadInput) as caught:
        begun(run, override)
    assert message in str(caught.value)


def test_a_source_may_move(run, data):
    if not (data / "elsewhere").exists():
        write_source(data / "elsewhere", "text", shards=3)
    assert begun(run, "sources.web.path=elsewhere").changes == ()


@pytest.mark.slow
def test_a_run_goes_on_with_other_shares_and_longer_rows(data):
    first = ["output=run", "train.steps=16", "sequence_length=32"]
    codes, output = end(start(data, 2, *first, "checkpoint.max_minutes=0.0001"))
    assert codes == [75, 75], output
    then = [*first[:2], "sequence_length=64", "sources.web.share=1.5", "train.lr=5e-3"]
    codes, output = end(start(data, 2, *then))
    assert codes == [0, 0], output
    output = " ".join(output.split())
    for change in ("sequence_length is 64, it was 32", "sources.web.share is 1.5, it was 0.25"):
        assert f"from step 2 on: {change}" in output
    logged = lines(data / "run")
    assert [line["step"] for line in logged] == list(range(1, 17))
    web = [line["rows/web"] for line in logged]
    assert web[0] == 2 and sum(web[1:]) == pytest.approx(15 * 8 * 1.5 / 2.25, abs=1)
    assert logged[-1]["total_rows/web"] == sum(web)


@pytest.mark.parametrize(
    ("key", "moves"),
    [
        ("sources.v1.0.held_out", False),
        ("sources.v1.0.loss_share", False),
        ("sources.v1.0.share", True),
        ("groups.old.share.limit", True),
        ("sources.share.path", False),
        ("sequence_length", True),
        ("train.lr", False),
    ],
)
def test_a_setting_moves_rows_whatever_the_name_of_its_source(key, moves):
    assert RecipeChange(key=key, old=1, new=2).moves_rows == moves
