"""Benchmarks of lm-evaluation-harness run on an exported model, offline, on a task of a local
file.
"""

import importlib.util
import json

import pytest
import torch
import transformers
from support.models import FAMILIES

from bigmix.commands.main import main

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("lm_eval") is None, reason="the extra lm-eval is not installed"
)
TASK = """\
task: rivers
dataset_path: json
dataset_kwargs: {{data_files: {{test: {path}}}}}
output_type: multiple_choice
test_split: test
doc_to_text: "{{{{question}}}}"
doc_to_target: "{{{{answer}}}}"
doc_to_choice: [river, tower]
metric_list: [{{metric: acc}}]
"""


@pytest.fixture
def model(tmp_path, tiny_tokenizer):
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(**FAMILIES["llama"] | {"vocab_size": 400})
    whole = transformers.AutoModelForCausalLM.from_config(config)
    whole.save_pretrained(tmp_path / "model")
    transformers.AutoTokenizer.from_pretrained(tiny_tokenizer).save_pretrained(tmp_path / "model")
    return whole.eval(), tmp_path / "model"


@pytest.mark.slow
def test_a_local_task_is_scored_as_by_a_plain_loop(model, tmp_path, tiny_tokenizer, monkeypatch):
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    whole, folder = model
    rows = [{"question": f"the {word} in", "answer": at % 2} for at, word in enumerate("abcdef")]
    path = tmp_path / "rivers.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "own").mkdir()
    (tmp_path / "own/rivers.yaml").write_text(TASK.format(path=path))
    arguments = [f"include_path={tmp_path / 'own'}", "device=cpu", "bootstrap_iters=0"]
    out = tmp_path / "out"
    assert (
        main(
            [
                "evaluate",
                str(folder),
                "--lm-eval",
                "rivers",
                "--output",
                str(out),
                "--lm-eval-args",
                *arguments,
            ]
        )
        == 0
    )
    found = json.loads((out / "lm-eval.json").read_text())
    assert found["model"] == str(folder) and found["tasks"] == ["rivers"]
    tokenizer = transformers.AutoTokenizer.from_pretrained(tiny_tokenizer)
    right = 0
    for row in rows:
        values = []
        for choice in (" river", " tower"):
            prompt, ids = (
                tokenizer(t)["input_ids"] for t in (row["question"], row["question"] + choice)
            )
            logs_TV = whole(torch.tensor([ids])).logits[0].log_softmax(dim=-1)
            values.append(
                sum(float(logs_TV[at - 1, ids[at]]) for at in range(len(prompt), len(ids)))
            )
        right += values.index(max(values)) == row["answer"]
    assert found["results"]["rivers"]["acc,none"] == pytest.approx(right / len(rows))


@pytest.mark.slow
def test_what_lm_eval_cannot_do_is_told(model, tmp_path, capsys):
    folder = str(model[1])
    (tmp_path / "own").mkdir()
    assert main(["evaluate", str(tmp_path), "--lm-eval", "arc_easy"]) == 2
    assert "has no config.json" in capsys.readouterr().err
    assert main(["evaluate", folder, "--lm-eval", "arc_easy", "--lm-eval-args", "fewshots=3"]) == 2
    assert "has 'fewshots=3', must be KEY=VALUE with a KEY of" in capsys.readouterr().err
