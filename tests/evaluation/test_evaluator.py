"""Every number of an evaluation is that of a plain loop over documents, in a run and outside."""

import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from support.evaluated import CHATS, FEW, TEXTS, expected_line, make
from support.ranks import ROOT, environment, free_port, start_script
from support.runs import catches, end, wait_until

from bigmix.errors import BadInput
from bigmix.evaluation.bootstrap import RESAMPLES, interval, resampled_sums
from bigmix.evaluation.forward import by_document
from bigmix.evaluation.held_out import Baseline, DocumentSums, Sum, summarise
from bigmix.evaluation.inputs import open_held_out
from bigmix.model.checks import read_evaluated
from bigmix.recipe import load_recipe

SOURCES = {"web": "text", "chat": "chat", "few": "few"}


@pytest.fixture(scope="module")
def data(tmp_path_factory, tiny_tokenizer):
    return make(tmp_path_factory.mktemp("evaluated"), tiny_tokenizer)


def start(data, script, ranks, *words):
    port, words = free_port(), ("recipe.yaml", *words)
    return [
        start_script(ROOT / "launch" / script, data, environment(rank, ranks, port), *words)
        for rank in range(ranks)
    ]


def evaluated(folder):
    return json.loads((folder / "evaluation.json").read_text())


def close_to(line):
    return {
        key: value if value is None else pytest.approx(value, rel=1e-6, abs=1e-6)
        for key, value in line.items()
    }


def whole_line(data, model, base):
    line = {}
    for source, name in SOURCES.items():
        line |= expected_line(data, name, source, model, base)
    return line


@pytest.mark.parametrize(
    "ranks", [pytest.param(1, marks=pytest.mark.slow), 2, pytest.param(3, marks=pytest.mark.slow)]
)
def test_every_number_is_that_of_a_plain_loop_over_documents(data, ranks):
    words = ["--model", "tuned", "--output", f"on-{ranks}"]
    codes, output = end(start(data, "evaluate.py", ranks, *words))
    assert codes == [0] * ranks, output
    found = evaluated(data / f"on-{ranks}")
    assert (found["version"], found["model"], found["base"]) == (1, "tuned", "base")
    base, model = found["lines"]
    assert base.pop("step") == 0 and model.pop("step") == 1
    assert base.pop("eval") is True and model.pop("eval") is True
    assert model == close_to(whole_line(data, "tuned", "base"))
    of_base = {k: v for k, v in whole_line(data, "base", "base").items() if "kl_to_base" not in k}
    assert base == close_to(of_base)
    assert 0 < model["last_word_accuracy/web"] < 1 and model["kl_to_base/chat"] > 0.01
    assert model["held_out_documents/web"] == len(TEXTS) and model["last_words/chat"] == 4
    assert "written to" in output and "held out, tuned" in output
    assert (data / f"on-{ranks}" / "recipe.yaml").is_file()


@pytest.fixture(scope="module")
def run(data):
    """A run on two ranks."""
    codes, output = end(start(data, "train.py", 2))
    assert codes == [0, 0], output
    return output


def lines(folder):
    found = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [line for line in found if line.get("eval")]


@pytest.mark.slow
def test_a_run_evaluates_as_the_command_does_on_its_export(data, run):
    first, last = lines(data / "run")
    assert last["kl_to_base/web"] > 0 and first["kl_to_base/web"] == pytest.approx(0, abs=1e-9)
    assert first["forgetting_low/web"] == first["forgetting_high/web"] == 0
    assert first == close_to(whole_line(data, "base", "base")) | {"step": 0, "eval": True}
    done = subprocess.run(
        [sys.executable, "-m", "bigmix.commands", "evaluate", "recipe.yaml", "--ranks", "1"],
        cwd=data,
        env=os.environ | {"PYTHONPATH": str(ROOT), "DS_ACCELERATOR": "cpu"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    found = evaluated(data / "run/evaluation")
    assert found["command"] == "bigmix evaluate recipe.yaml --ranks 1"
    assert found["model"] == "run/export" and found["lines"][1] == close_to(last)


def test_a_missing_export_is_reported_before_anything_is_built(data):
    codes, text = end(start(data, "evaluate.py", 1, "output=fresh"))
    assert codes == [2], text
    assert "fresh/export is no folder" in text and "Traceback" not in text
    assert not (data / "fresh").exists()


def test_models_that_do_not_fit_the_sources_are_refused_together(data, monkeypatch):
    monkeypatch.chdir(data)
    recipe = load_recipe("recipe.yaml")
    inputs = open_held_out(recipe, verify=True)
    shutil.copytree("tuned", "other")
    tokenizer, config = Path("other/tokenizer.json"), Path("other/config.json")
    spoken = json.loads(tokenizer.read_text())
    vocabulary = spoken["model"]["vocab"]
    vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]
    tokenizer.write_text(json.dumps(spoken))
    changed = {"max_position_embeddings": 32, "vocab_size": 500}
    config.write_text(json.dumps(json.loads(config.read_text()) | changed))

    def faults(**paths):
        given = {f"--{name}": path for name, path in paths.items()}
        with pytest.raises(BadInput) as caught:
            read_evaluated(recipe, inputs.manifests[0], inputs.tokenizer_folder, given)
        return str(caught.value)

    output = faults(base="base", model="other")
    assert "--model other has positions for 32" in output
    assert "the tokenizer of other" in output
    assert "--base base has 400, --model other has 500" in output
    assert "--base no/such/model gives no model configuration" in faults(base="no/such/model")
    with pytest.raises(BadInput, match="held_out of few: gone is not a prepared source"):
        open_held_out(load_recipe("recipe.yaml", ["held_out.few=gone"]), verify=True)
    lacks = ["held_out={}", "sources.web.held_out=null", "sources.chat.held_out=null"]
    with pytest.raises(BadInput, match="no held-out source is in the recipe"):
        open_held_out(load_recipe("recipe.yaml", lacks), verify=True)


def test_a_divergence_to_nothing_is_refused(data):
    scratch = ["model.path=null", "model.config={model_type: llama}"]
    with pytest.raises(BadInput, match="evaluate.kl is true, and a model from scratch"):
        load_recipe(str(data / "recipe.yaml"), scratch)


@pytest.mark.slow
def test_without_a_base_nothing_is_said_of_forgetting(data):
    words = ["--model", "tuned", "--base", "none", "--output", "alone", "evaluate.rows=1"]
    codes, output = end(start(data, "evaluate.py", 1, *words))
    assert codes == [0], output
    (line,) = evaluated(data / "alone")["lines"]
    assert not [key for key in line if "forgetting" in key or "kl_to_base" in key]
    assert line["held_out_documents/few"] == len(FEW)
    assert line["held_out_documents/chat"] < len(CHATS)


def test_a_signal_ends_an_evaluation_with_the_words_for_it(data):
    ranks = start(data, "evaluate.py", 2, "--model", "tuned", "--output", "stopped")
    for process in ranks:
        wait_until(lambda rank=process: catches(rank, signal.SIGUSR2))  # the last handler
        process.send_signal(signal.SIGTERM)
    codes, output = end(ranks)
    assert codes == [75, 75], output
    assert "run the same command to repeat it" in output
    assert not (data / "stopped/evaluation.json").exists()


def test_intervals_are_those_of_drawing_documents_one_by_one():
    draw = np.random.default_rng(3)
    for documents in (1, 7, 3000):
        numbers_DK = draw.normal(size=(documents, 3))
        draws = np.random.default_rng(11)
        slow = [
            numbers_DK[draws.integers(0, documents, documents)].sum(0) for _ in range(RESAMPLES)
        ]
        assert resampled_sums(numbers_DK, 11) == pytest.approx(np.array(slow), abs=1e-9)
    assert interval(np.array([np.nan, *range(101)])) == (2.5, 97.5)
    assert resampled_sums(np.zeros((0, 3)), 1).tolist() == [[0.0] * 3] * RESAMPLES


@pytest.mark.slow
def test_a_hundred_thousand_documents_take_seconds():
    sums_DM = np.random.default_rng(0).random((100_000, 2 * len(Sum)))
    began = time.process_time()
    resampled_sums(sums_DM, 1)
    assert time.process_time() - began < 15


def part(shard, document, row, tokens, of, words):
    return [shard, document, row, tokens, of, tokens - 1, 2.0, 1.0, 0.5, 1, words]


def test_parts_of_a_document_add_up_and_the_last_one_has_its_last_word():
    parts = np.array(
        [
            part(1, 0, 9, 5, 5, words=1),
            part(0, 3, 2, 6, 10, words=0),  # the end, whose word is wrong
            part(0, 3, 1, 4, 10, words=1),
            part(0, 4, 2, 4, 9, words=1),  # its end is not here
            part(0, 5, 3, 1, 1, words=1),  # no loss token
        ]
    )
    found = by_document(parts, has_kl=True)
    assert found.ids_D2.tolist() == [[0, 3], [0, 4], [1, 0]]
    assert found.sums_DM.tolist() == [
        [8, 4, 2, 1, 1, 0],
        [3, 2, 1, 0.5, 0, 0],
        [4, 2, 1, 0.5, 1, 1],
    ]
    assert by_document(parts[:0], has_kl=True).sums_DM.shape == (0, len(Sum))


def sums(loss, documents=5):
    sums_DM = np.ones((documents, len(Sum)))
    sums_DM[:, Sum.NLL] = loss
    ids = np.stack([np.zeros(documents, int), np.arange(documents)], axis=1)
    return DocumentSums(ids_D2=ids, sums_DM=sums_DM, has_kl=False)


def test_the_base_outlives_a_run_and_pairs_only_what_belongs_together(tmp_path: Path):
    base = Baseline()
    base.take("web", sums(2.0))
    base.take("web", sums(9.0))
    base.write(tmp_path)
    other = Baseline()
    other.resume(base.losses)
    other.put_back((tmp_path / "held-out-base.npz").read_bytes())

    def forgetting(now, base):
        return summarise("web", now, tokens_per_byte=1.0, base=base).forgetting

    assert forgetting(sums(2.5), other) == forgetting(sums(2.5), base)
    assert (forgetting(sums(2.5), other).low, forgetting(sums(2.5), other).high) == (0.5, 0.5)
    fewer = forgetting(sums(2.5, documents=4), other)
    assert fewer.value == 0.5 and math.isnan(fewer.low)
    other.resume({"web": 1.5})  # of another run in the same folder
    assert forgetting(sums(2.5), other).value == 1.0
    assert math.isnan(forgetting(sums(2.5), other).high)


def test_a_source_without_documents_has_no_numbers():
    found = summarise("web", sums(2.0, documents=0), tokens_per_byte=1.0, base=None)
    assert math.isnan(found.loss.value) and math.isnan(found.loss.low) and found.num_documents == 0
    assert found.last_word_accuracy is None
