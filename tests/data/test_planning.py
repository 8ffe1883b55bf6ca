"""What a recipe says of groups, sizes, limits and lengths is what the run draws, plans and logs."""

import json
import re
import signal

import numpy as np
import pytest
from hypothesis import given, reject, settings
from hypothesis import strategies as st
from support.commands import printed
from support.corpora import write_source
from support.ranks import ROOT
from support.recipes import recipe_of_three
from support.runs import end, lines, start, wait_for

from bigmix.commands.plan import counts as plan_counts
from bigmix.data.loader import step_batch
from bigmix.data.records import RankRows
from bigmix.errors import BadInput
from bigmix.recipe import load_recipe, to_yaml
from bigmix.train.inputs import open_inputs


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return recipe_of_three(tmp_path_factory.mktemp("mixing"))


@pytest.fixture
def here(data, monkeypatch):
    monkeypatch.chdir(data)
    return data


def opened(*overrides):
    return open_inputs(load_recipe("recipe.yaml", overrides), ranks=1, verify=False)


def refused(*overrides):
    with pytest.raises(BadInput) as caught:
        opened(*overrides)
    return caught.value.faults


def drawn(inputs):
    return inputs.plan.mixture.counts(inputs.plan.steps * inputs.plan.rows_per_step)


def epochs(inputs):
    return inputs.plan.epochs(inputs.plan.steps)


GROUP = ["groups={old: {share: 1}}", "sources.web.group=old", "sources.code.group=old"]


def test_a_group_divides_its_share(here):
    inputs = opened(*GROUP, "sources.chat.share=3", "sources.web.share=3", "sources.code.share=1")
    assert drawn(inputs) == {"web": 30, "code": 10, "chat": 120}
    assert inputs.plan.shares_of_step(1).loss == {"web": 0.1875, "code": 0.0625, "chat": 0.75}


@pytest.mark.parametrize("power", [0, 0.5, 1])
def test_a_temperature_raises_small_sources(here, power):
    sizes = [f"sources.{name}.share={{temperature: {power}}}" for name in ("web", "code")]
    inputs = opened(*GROUP, *sizes)
    tokens = {name: inputs.plan.streams[name].manifest.tokens for name in ("web", "code")}
    total = sum(n**power for n in tokens.values())
    shares = inputs.plan.shares_of_step(1).rows
    for name, count in tokens.items():
        assert shares[name] == pytest.approx(count**power / total * 2 / 3, abs=1e-6)


def test_sizes_count_within_their_group(here):
    """A group of small sources next to one of large ones: their ratio is not lost in the
    rounding.
    """
    write_source(here / "tiny", "text", seed=3, shards=1, documents=2, lengths=(5, 6))
    write_source(here / "small", "text", seed=4, shards=1, documents=6, lengths=(5, 6))
    both = [f"sources.{n}.share={{temperature: 9}}" for n in ("web", "code")]
    more = [
        f"sources.{n}={{path: {n}, role: replay, group: few, share: {{temperature: 1}}}}"
        for n in ("tiny", "small")
    ]
    groups = ["groups={old: {share: 1}, few: {share: 1}}", *GROUP[1:]]
    shares = opened(*groups, *both, *more).plan.shares_of_step(1).rows
    assert shares["small"] / shares["tiny"] == pytest.approx(3, rel=1e-4)


def test_a_loss_share_is_apart_from_the_share(here):
    inputs = opened("sources.web.loss_share=0.5")
    shares = inputs.plan.shares_of_step(1)
    assert shares.rows == {"web": 0.25, "code": 0.25, "chat": 0.5}
    assert shares.loss == {"web": 0.4, "code": 0.2, "chat": 0.4}


def numbers_in(fault):
    limit = float(re.search(r"max_epochs to ([0-9.e+]+)[, ]", fault)[1])
    share = re.search(r"\.share to ([0-9.e+-]+) or less", fault)
    return limit, share and float(share[1])


BUDGETS = [
    ["budget.steps=20"],
    ["budget={total_tokens: 9000}"],
    ["budget={task_tokens: 4000}"],
    ["sequence_length=[[0, 16], [9, 64]]"],
    ["budget.steps=61", "rows_per_step=6"],
    [*GROUP, "budget={total_tokens: 12000}"],
]


@pytest.mark.parametrize("budget", BUDGETS)
@pytest.mark.parametrize("limit", [0.31, 1.37])
def test_a_limit_that_is_too_low_is_refused_and_either_number_helps(here, budget, limit):
    (fault,) = refused(f"sources.code.max_epochs={limit}", *budget)
    assert f"sources.code.max_epochs is {limit} and the run goes through it" in fault
    higher, share = numbers_in(fault)
    assert epochs(opened(f"sources.code.max_epochs={higher}", *budget))["code"] <= higher
    least = epochs(opened(*budget))["code"]
    assert higher - 0.01 < least <= higher
    inputs = opened(f"sources.code.max_epochs={limit}", f"sources.code.share={share}", *budget)
    assert 0.7 * limit < epochs(inputs)["code"] <= limit


def test_no_share_is_advised_where_none_helps(here):
    """Fewer of the rows of the one task source are as many more steps."""
    (fault,) = refused("sources.chat.max_epochs=1", "budget={task_tokens: 20000}")
    higher, share = numbers_in(fault)
    assert share is None
    opened(f"sources.chat.max_epochs={higher}", "budget={task_tokens: 20000}")


def test_every_limit_that_is_too_low_is_reported(here):
    found = refused("sources.code.max_epochs=1", "sources.chat.max_epochs=0.5")
    assert [fault.split(".")[1] for fault in found] == ["code", "chat"]


def test_a_run_stops_where_a_source_is_used_up(here):
    inputs = opened("sources.code.max_epochs=2", "sources.code.when_exhausted=stop")
    assert inputs.plan.steps < 20
    assert epochs(inputs)["code"] <= 2 < inputs.plan.epochs(inputs.plan.steps + 1)["code"]
    assert f"the run ends after {inputs.plan.steps} steps and not 20" in inputs.notes[0]
    # A limit that comes after the stop is never reached.
    later = ["sources.chat.max_epochs=1", "sources.code.when_exhausted=stop"]
    assert "chat" in refused("sources.code.max_epochs=9", *later)[0]
    assert opened("sources.code.max_epochs=0.5", *later).plan.steps < inputs.plan.steps


LIMITS = ["sources.code.max_epochs=1.3", "sources.code.when_exhausted=renormalise"]


@pytest.mark.parametrize("rows_per_step", [2, 6, 8, 10])
@pytest.mark.parametrize("limit", [0.6, 1, 1.3, 2.1])
@pytest.mark.parametrize("shares", [(0.25, 0.25, 0.5), (0.3, 0.37, 0.33), (0.07, 0.6, 0.33)])
def test_sources_leave_one_after_the_other(here, rows_per_step, limit, shares):
    names = ("web", "code", "chat")
    given = [f"sources.{n}.share={share}" for n, share in zip(names, shares, strict=True)]
    limits = [f"sources.{n}.max_epochs={limit}" for n in ("code", "chat")]
    limits += [f"sources.{n}.when_exhausted=renormalise" for n in ("code", "chat")]
    inputs = opened(*given, *limits, "budget.steps=400", f"rows_per_step={rows_per_step}")
    ends = inputs.plan.mixture.shares.ends
    assert set(ends) == {"code", "chat"} and len(inputs.notes) == 2
    for name, after in ends.items():
        rows = inputs.plan.streams[name].rows_per_epoch
        # One row of a step is the least that a limit can be missed by.
        assert limit - (rows_per_step + 2) / rows < epochs(inputs)[name] <= limit
        assert inputs.plan.shares_of_step(after + 1).rows[name] == 0
        assert inputs.plan.shares_of_step(after + 1).loss[name] == 0
    both = max(ends.values())
    assert inputs.plan.shares_of_step(both + 1).rows["web"] == pytest.approx(1)
    assert sum(drawn(inputs).values()) == 400 * rows_per_step


@settings(max_examples=60, deadline=None)
@given(
    rows_per_step=st.integers(1, 7),
    shares=st.lists(st.integers(10, 1000), min_size=3, max_size=3),
    limits=st.lists(st.integers(40, 250), min_size=3, max_size=3),
    longer=st.integers(0, 30),
)
def test_no_source_that_leaves_comes_back(data, rows_per_step, shares, limits, longer):
    """Each is owed a part of a row when it leaves; these parts together are rows that a source must
    give.
    """
    names = ("code", "chat", "more")
    overrides = [f"rows_per_step={rows_per_step}", "budget.steps=200"]
    overrides += ["sources.more={path: more, role: replay, share: 1}"]
    overrides += [f"sources.{n}.share={s / 1000}" for n, s in zip(names, shares, strict=True)]
    overrides += [f"sources.{n}.max_epochs={m / 100}" for n, m in zip(names, limits, strict=True)]
    overrides += [f"sources.{n}.when_exhausted=renormalise" for n in names]
    overrides += ["train.micro_batch_rows=1", f"deepspeed={ROOT}/ds_configs/cpu.json"]
    overrides += [f"sources.{n}.path={data / n}" for n in ("web", *names)]
    if longer:
        overrides.append(f"sequence_length=[[0, 60], [{longer}, 64]]")
    recipe = load_recipe(str(data / "recipe.yaml"), overrides)
    try:
        inputs = open_inputs(recipe, ranks=1, verify=False)
    except BadInput as error:
        # A limit of a few rows may not last for one step.
        assert "is used up within the first step" in str(error) and rows_per_step > 1
        reject()
    for name in names:
        assert epochs(inputs)[name] <= recipe.sources[name].max_epochs
    assert sum(drawn(inputs).values()) == 200 * rows_per_step


def test_when_all_have_left_nothing_is_left(here):
    limits = [f"sources.{n}.max_epochs=1" for n in ("web", "code", "chat")]
    limits += [f"sources.{n}.when_exhausted=renormalise" for n in ("web", "code", "chat")]
    (fault,) = refused(*limits, "budget.steps=200")
    assert "every source (" in fault and "has reached its max_epochs after" in fault
    (fault,) = refused(*limits, "budget={total_tokens: 1M}")
    assert "every source (" in fault
    assert opened(*limits, "budget.steps=3").notes == []


def test_what_is_left_must_have_a_share(here):
    (fault,) = refused(
        *LIMITS,
        "sources.web.share=[[0, 1], [18, 0]]",
        "sources.chat.share=[[0, 1], [18, 0]]",
        "budget.steps=40",
    )
    assert "share of every source is 0 at step 18, since code has reached its max_epochs" in fault
    limits = ["sources.chat.max_epochs=0.5", "sources.chat.when_exhausted=renormalise"]
    (fault,) = refused(*limits, "budget={task_tokens: 1M}")
    assert (
        "budget.task_tokens is 1,000,000 and" in fault
        and "raise their last point or max_epochs" in fault
    )


def test_a_limit_below_one_step_is_refused(here):
    (fault,) = refused("sources.code.max_epochs=0.01", "sources.code.when_exhausted=stop")
    assert "is used up within the first step" in fault


def test_texts_below_a_length_stay_whole(here):
    plan = opened("sources.web.whole_below=61").plan
    stream = plan.streams["web"]
    parts = [stream.read(row) for row in stream.in_shard_order()]
    documents = [(row.id.shard, int(d)) for row in parts for d in row.documents_P]
    assert len(documents) == len(set(documents)) == stream.manifest.documents


LONGER = ["sequence_length=[[0, 20], [5, 40], [9, 60]]", "pad_to_multiple=16"]


def test_rows_grow_and_are_padded(here):
    inputs = opened(*LONGER)
    rank_rows = RankRows(rank=0, ranks=1, rows_per_step=8, micro_batch_rows=2)
    batches = {k: step_batch(inputs.plan, rank_rows, k) for k in (1, 5, 6, 9, 10, 20)}
    widths = [batch.micro_batches[0].ids_BT.shape[1] for batch in batches.values()]
    assert widths == [32, 32, 48, 48, 64, 64]
    assert load_recipe("recipe.yaml", LONGER).longest_row == 64
    fill_ratio = inputs.plan.fill_ratio("web", drawn(inputs)["web"])
    rows = {k: step_batch(inputs.plan, rank_rows, k) for k in range(1, 21)}
    places = sum(b.rows["web"] * b.micro_batches[0].ids_BT.shape[1] for b in rows.values())
    assert fill_ratio == pytest.approx(
        sum(b.tokens["web"] for b in rows.values()) / places, rel=0.01
    )


@pytest.mark.parametrize("kind", ["task_tokens", "total_tokens"])
def test_a_budget_of_tokens_counts_rows_as_they_grow(here, kind):
    inputs = opened(*LONGER, f"budget={{{kind}: 30000}}")
    rank_rows = RankRows(rank=0, ranks=1, rows_per_step=8, micro_batch_rows=8)
    sums = []
    for step in range(1, inputs.plan.steps + 1):
        tokens = step_batch(inputs.plan, rank_rows, step).tokens
        sums.append(tokens["chat"] if kind == "task_tokens" else sum(tokens.values()))
    assert sum(sums[:-1]) == pytest.approx(30000, abs=1.5 * max(sums))
    assert sum(sums) == pytest.approx(30000, abs=1.5 * max(sums))


def test_an_estimate_looks_at_every_length(here, monkeypatch):
    recipe = load_recipe("recipe.yaml", [*LONGER, "budget.steps=200"])
    inputs = open_inputs(recipe, ranks=1, verify=False)
    exact = plan_counts.count(recipe, inputs.plan)
    monkeypatch.setattr(plan_counts, "EXACT_ROWS", 100)
    monkeypatch.setattr(plan_counts, "SAMPLE_ROWS", 30)
    about = plan_counts.count(recipe, inputs.plan)
    for name, source in about.sources.items():
        assert source.num_tokens == pytest.approx(exact.sources[name].num_tokens, rel=0.03)
        assert (source.num_rows, source.epochs) == (
            exact.sources[name].num_rows,
            exact.sources[name].epochs,
        )


def test_chats_that_are_lost_while_rows_are_short_are_reported(here):
    inputs = opened(*LONGER)
    short = inputs.plan.streams_at(1)["chat"].lost
    assert inputs.plan.lost("chat") == short and short.dropped > 0
    assert inputs.plan.streams["chat"].lost.dropped == 0


EVERYTHING = [
    *GROUP,
    "groups.old.share=[[0, 0.5], [10, 1]]",
    "sources.web.share=0.6",
    "sources.code.share=0.4",
    *LIMITS,
    *LONGER,
    "budget.steps=24",
    "checkpoint.every=3",
]


def test_the_resolved_recipe_means_the_same(here):
    overrides = [
        *EVERYTHING,
        "sources.web.loss_share=[[0, 1], [9, 2]]",
        "sources.web.whole_below=20",
    ]
    sizes = [f"sources.{name}.share={{temperature: 0.5}}" for name in ("web", "code")]
    recipe = load_recipe("recipe.yaml", [*overrides, *sizes])
    (here / "resolved.yaml").write_text(to_yaml(recipe))
    again = load_recipe("resolved.yaml")
    assert again == recipe
    one, two = (open_inputs(r, ranks=1, verify=False) for r in (recipe, again))
    assert one.notes == two.notes and one.plan.steps == two.plan.steps
    assert all(one.plan.row_ids(k) == two.plan.row_ids(k) for k in range(1, 25))


@pytest.fixture(scope="module")
def whole(data):
    codes, output = end(start(data, 2, "output=whole", *EVERYTHING))
    assert codes == [0, 0], output
    return lines(data / "whole"), output


@pytest.mark.slow
def test_a_run_logs_what_its_plan_says(data, whole):
    logged, output = whole
    assert "code is left out and its share given to the others" in output
    machine = ["--gpus", "2", "--gpu", "cpu"]
    plan = json.loads(printed(data, "plan", "recipe.yaml", *EVERYTHING, *machine, "--json"))
    last = logged[-1]
    assert plan["exact"] and plan["steps"] == last["step"] == len(logged) == 24
    for name, source in plan["sources"].items():
        for unit in ("rows", "tokens", "loss_tokens"):
            assert (
                source[unit]
                == last[f"total_{unit}/{name}"]
                == sum(k[f"{unit}/{name}"] for k in logged)
            )
        assert source["epochs"] == last[f"epoch/{name}"]
        assert source["share"]["gradient"] == pytest.approx(last[f"gradient_share/{name}"])
        assert f"{source['epochs']:.2f}" in output
    assert source["role"] == "task" and plan["sources"]["code"]["epochs"] <= 1.3
    gone = [line["step"] for line in logged if line["rows/code"]]
    assert max(gone) < 24
    tokens = [sum(line[f"tokens/{name}"] for name in plan["sources"]) for line in logged]
    assert np.mean(tokens[:5]) < 8 * 20 and 8 * 20 < np.mean(tokens[5:9]) < 8 * 40 < np.mean(
        tokens[9:]
    )


@pytest.mark.slow
def test_such_a_run_resumes_with_the_same_lines(data, whole):
    killed = start(data, 2, "output=killed", *EVERYTHING)
    wait_for(data / "killed/checkpoints/step-000006", killed)
    for process in killed:
        process.send_signal(signal.SIGKILL)
    end(killed)
    codes, output = end(start(data, 2, "output=killed", *EVERYTHING))
    assert codes == [0, 0] and "going on after step" in output, output
    assert lines(data / "killed") == whole[0]
