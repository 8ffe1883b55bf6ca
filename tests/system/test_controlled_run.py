"""Real runs with a share controller: forgetting is held, rows are exact between decisions, and a
killed run decides alike.
"""

import json
import shutil
import signal
from itertools import pairwise

import pytest
from support.corpora import write_source
from support.runs import end, lines, start, wait_for, weights

from bigmix.text.tokenizer import fingerprint_of

RECIPE = """\
model: {config: {model_type: llama, vocab_size: 96, hidden_size: 32, intermediate_size: 64,
                 num_hidden_layers: 2,
                 num_attention_heads: 4, max_position_embeddings: 64}}
sequence_length: 64
rows_per_step: 8
sources:
  web: {path: web, role: replay, share: 1, held_out: web-held}
budget: {steps: 50}
train: {lr: 1e-2, micro_batch_rows: 4, log_every: 20}
deepspeed: ds_configs/cpu.json
output: base
"""
LIMIT = 0.8
TASK = [
    "model={path: base/export}",
    "sources.task={path: task, role: task, share: 1, held_out: task-held}",
    "train.lr=3e-3",
    "budget={task_tokens: 24K}",
    "evaluate.every=6",
    "evaluate.rows=8",
]
HELD = [*TASK, f"sources.web.share={{controller: forgetting, limit: {LIMIT}, start: 0.05}}"]


@pytest.fixture(scope="module")
def data(tmp_path_factory, tiny_tokenizer):
    """A model that knows how web counts; the task counts in other steps, and beside web it must
    tell them apart.
    """
    folder = tmp_path_factory.mktemp("controlled")
    fingerprint = fingerprint_of(str(tiny_tokenizer))
    for name, seed in (("web", 0), ("task", 1)):
        write_source(folder / name, seed=seed, documents=200, fingerprint=fingerprint)
        write_source(
            folder / f"{name}-held", seed=seed, shards=1, documents=60, fingerprint=fingerprint
        )
    (folder / "recipe.yaml").write_text(RECIPE)
    codes, said = end(start(folder, 2))
    assert codes == [0, 0], said
    shutil.copytree(tiny_tokenizer, folder / "base/export", dirs_exist_ok=True)
    return folder


def run(data, output, *overrides):
    codes, said = end(start(data, 2, f"output={output}", *overrides))
    assert codes == [0, 0], said
    return data / output, said


def curve(folder, key="forgetting/web"):
    return {line["step"]: line[key] for line in lines(folder) if "eval" in line}


@pytest.fixture(scope="module")
def held(data):
    return run(data, "held", *HELD)


@pytest.mark.slow
def test_each_source_has_its_share_since_every_decision_and_over_the_run(held):
    steps = {line["step"]: line for line in lines(held[0]) if "eval" not in line}
    decided = curve(held[0], "share/web")
    due = drawn = 0.0
    for (step, share), (until, _) in pairwise(decided.items()):
        rows = [steps[k]["rows/web"] for k in range(step + 1, until + 1)]
        whole = sum(rows) / (8 * len(rows))
        for count in range(1, len(rows) + 1):
            assert abs(sum(rows[:count]) - 8 * count * whole) <= 1
        due, drawn = due + 8 * len(rows) * share, drawn + sum(rows)
        assert abs(due - drawn) <= 1, step


@pytest.mark.slow
def test_the_budget_is_met_and_the_learning_rate_has_no_jump(held):
    steps = [line for line in lines(held[0]) if "eval" not in line]
    assert steps[-1]["total_tokens/task"] == pytest.approx(24_000, abs=2 * 8 * 64)
    rates = [line["lr"] for line in steps]
    peak = rates.index(max(rates))
    falls = [a - b for a, b in pairwise(rates[peak:])]
    assert min(falls) >= 0 and max(falls) < 0.1 * max(rates)
    assert rates[-1] < 0.01 * max(rates)


@pytest.mark.slow
def test_a_killed_run_takes_the_same_decisions_and_ends_bit_equal(data, held):
    saves = ["output=killed", *HELD, "checkpoint.every=4"]
    for step in ("step-000012", "step-000020"):
        killed = start(data, 2, *saves)
        wait_for(data / "killed/checkpoints" / step, killed)
        for process in killed:
            process.send_signal(signal.SIGKILL)
        end(killed)
    codes, said = end(start(data, 2, *saves))
    assert codes == [0, 0] and "going on after step" in said, said
    assert lines(data / "killed") == lines(held[0])
    assert weights(data / "killed") == weights(held[0])


@pytest.mark.slow
def test_the_decisions_are_in_the_checkpoint_and_told(held):
    folder, said = held
    newest = (folder / "checkpoints/latest").read_text().strip()
    position = json.loads((folder / "checkpoints" / newest / "checkpoint.json").read_text())[
        "position"
    ]
    shares = curve(folder, "share/web")
    assert {d["step"]: d["shares"]["web"] for d in position["decisions"]} == {
        step: pytest.approx(share) for step, share in list(shares.items())[1:-1]
    }
    assert "web 5.00% -> " in said and "the share of web begins at 0.05 and moves" in said


@pytest.mark.slow
def test_forgetting_is_held_where_one_way_and_a_small_share_forget(data, held):
    one_way = [*TASK, "sources.web.share=1e-9", "checkpoint.export=false"]
    forgets = curve(run(data, "one-way", *one_way)[0])
    small = [*TASK, "sources.web.share=0.05", "sources.task.share=0.95", "checkpoint.export=false"]
    forgets_less = curve(run(data, "small", *small)[0])
    found = curve(held[0])
    last = found.popitem()[1]
    assert 0.4 * LIMIT < last <= LIMIT, found
    assert forgets.popitem()[1] > 4 * LIMIT and forgets_less.popitem()[1] > 3 * LIMIT
    shares = list(curve(held[0], "share/web").values())
    assert shares[0] == 0.05 and max(shares) > 1.2 * shares[-1], (
        "raised in need, lowered when there is room"
    )


@pytest.mark.slow
def test_a_rule_of_ones_own_that_fails_ends_the_run_and_mended_goes_on(data):
    own = [
        *TASK,
        "sources.web.share={controller: 'mine.py:rule', start: 0.1}",
        "budget={steps: 13}",
        "checkpoint.every=0",
    ]
    (data / "mine.py").write_text("def rule(reading):\n    return 1 / (reading.step - 12)\n")
    codes, said = end(start(data, 2, "output=own", *own))
    assert codes == [1, 1], said
    assert "mine.py:rule gives -0.16666666666666666 for the share of web after step 6" in said
    mended = "    return 0.3 if reading.losses['task'] > 0 and not reading.earlier else 0.2\n"
    (data / "mine.py").write_text(f"def rule(reading):\n{mended}")
    codes, said = end(start(data, 2, "output=own", *own))
    assert codes == [0, 0] and "going on after step 6" in said, said
    assert [round(share, 3) for share in curve(data / "own", "share/web").values()] == [
        0.1,
        0.3,
        0.2,
        0.2,
    ]


@pytest.mark.slow
def test_what_is_due_at_the_end_is_asked_where_a_decision_ends_the_run(data):
    """5 % of 8 rows are 0.4, so that 7 steps are planned for 46 rows of the task, which the first 6
    have already.
    """
    (data / "five.py").write_text("def rule(reading):\n    return 0.05\n")
    (data / "asked.jsonl").write_text('{"prompt": "7", "response": "8"}\n')
    folder, said = run(
        data,
        "short",
        *TASK,
        "sources.web.share={controller: 'five.py:rule', start: 0.05}",
        f"budget={{task_tokens: {46 * 64}}}",
        "tasks.next={path: asked.jsonl, format: text, scores: [exact_match], max_new_tokens: 2,"
        " when: last}",
    )
    assert "7 steps (task tokens" in said and "6 steps in all" in said, said
    last = lines(folder)[-1]
    assert last["step"] == 6 and "task/next/exact_match" in last, last
