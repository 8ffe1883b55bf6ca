"""A run asks its tasks when they are due, and writes their scores and outputs down."""

import json

import pytest
from support.runs import end, lines, start

from bigmix.commands.main import main

RECIPE = """\
model: {config: {model_type: llama, vocab_size: 400, hidden_size: 32, intermediate_size: 64,
                 num_hidden_layers: 2,
                  num_attention_heads: 4, max_position_embeddings: 64}}
sequence_length: 64
rows_per_step: 4
sources:
  chat: {path: chat, role: task, share: 1}
budget: {steps: 3}
train: {lr: 1e-2, micro_batch_rows: 2, log_every: 1}
evaluate: {every: 2}
deepspeed: ds_configs/cpu.json
output: run
tasks:
  sums: {path: sums.jsonl, scores: [numeric_match, exact_match, bleu], max_new_tokens: 4,
        samples: 2}
  signs: {path: signs.jsonl, by: likelihood, scores: [accuracy, macro_f1], when: every}
  code: {path: code.jsonl, scores: [pass@1], execute: true, when: last, max_new_tokens: 4}
"""


def write_lines(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture(scope="module")
def data(tmp_path_factory, tiny_tokenizer):
    folder = tmp_path_factory.mktemp("task-run")
    sums = [{"prompt": f"{a} and {b}", "response": str(a + b)} for a in range(9) for b in range(5)]
    write_lines(folder / "chat.jsonl", sums * 4)
    write_lines(folder / "sums.jsonl", sums[:5])
    signs = [
        {"prompt": row["prompt"], "label": ["even", "odd"][int(row["response"]) % 2]}
        for row in sums
    ]
    write_lines(folder / "signs.jsonl", signs[:7])
    write_lines(folder / "code.jsonl", [{"prompt": "Write nothing.", "test": "assert 1 == 1"}])
    out = str(folder / "chat")
    assert (
        main(
            [
                "prepare",
                str(folder / "chat.jsonl"),
                "--tokenizer",
                str(tiny_tokenizer),
                "--out",
                out,
            ]
        )
        == 0
    )
    (folder / "recipe.yaml").write_text(RECIPE)
    return folder


def test_a_run_scores_its_tasks_when_they_are_due(data):
    codes, said = end(start(data, 2))
    assert codes == [0, 0], said
    assert "warning: task code runs code that the model writes" in said
    assert "tasks, step 3" in said and "numeric_match" in said
    evaluations = {line["step"]: line for line in lines(data / "run") if "eval" in line}
    asked = {
        step: sorted({key.split("/")[1] for key in line if key.startswith("task_examples/")})
        for step, line in evaluations.items()
    }
    assert asked == {0: ["signs", "sums"], 2: ["signs"], 3: ["code", "signs", "sums"]}
    last = evaluations[3]
    for kind in ("sums/numeric_match", "sums/bleu", "signs/macro_f1", "code/pass@1"):
        assert (
            0 <= last[f"task_low/{kind}"] <= last[f"task/{kind}"] <= last[f"task_high/{kind}"] <= 1
        )
    assert last["task_examples/sums"] == 5 and last["task_examples/signs"] == 7
    kept = [
        json.loads(line)
        for line in (data / "run/samples/sums/step-000003.jsonl").read_text().splitlines()
    ]
    assert [each["prompt"] for each in kept] == ["0 and 0", "0 and 2"]
    assert kept[0].keys() == {"prompt", "references", "outputs", "scores"}
    assert kept[0]["references"] == ["0"] and kept[0]["scores"].keys() == {
        "numeric_match",
        "exact_match",
        "bleu",
    }


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (
            ["tasks.sums.path=gone.jsonl", "tasks.signs.labels=[even, of]"],
            "tasks.sums: input gone.jsonl is no file",
        ),
        (
            ["tasks.sums.max_new_tokens=60"],
            "tasks.sums: 5 of 5 prompts do not fit the 64 positions of the model",
        ),
    ],
)
def test_tasks_that_cannot_be_asked_end_the_run_before_it_begins(data, overrides, said):
    codes, text = end(start(data, 1, "output=bad", *overrides))
    assert codes == [2] and said in text and "Traceback" not in text
    if "labels" in str(overrides):
        assert "line 2: label 'odd' is none of labels" in text
    assert not (data / "bad/metrics.jsonl").exists()
