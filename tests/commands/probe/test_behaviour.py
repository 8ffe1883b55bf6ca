"""`bigmix probe behaviour` measures what a loop over single prompts does, and writes it down."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from support.chat_models import NEW_TOKENS, PROMPTS, by_loop, make
from support.commands import printed

from bigmix.commands.main import main
from bigmix.commands.probe.behaviour import probe_behaviour
from bigmix.evaluation.behaviour.baseline import BASE_ANSWERS
from bigmix.recipe.sections import Behaviour

WORDS = ("--prompts", "prompts.jsonl", "--max-new-tokens", str(NEW_TOKENS), "--batch", "3")


@pytest.fixture(scope="module")
def data(tmp_path_factory, tiny_tokenizer):
    return make(tmp_path_factory.mktemp("probed"), tiny_tokenizer)


def test_numbers_and_answers_are_those_of_a_loop(data):
    words = ("probe", "behaviour", "tuned", "--base", "base", *WORDS, "--output", "out", "--json")
    found = json.loads(printed(data, *words))
    assert found == json.loads((data / "out/behaviour.json").read_text())
    assert (found["version"], found["model"], found["base"]) == (1, "tuned", "base")
    first, last = found["lines"]
    expected = by_loop(data, "tuned")
    tokens, nll, base_nll, kl = np.array(expected["sums"]).sum(axis=0)
    assert last["behaviour/loss"] == pytest.approx(nll / tokens, abs=1e-6)
    assert first["behaviour/loss"] == pytest.approx(base_nll / tokens, abs=1e-6)
    assert last["behaviour/forgetting"] == pytest.approx((nll - base_nll) / tokens, abs=1e-6)
    assert last["behaviour/kl"] == pytest.approx(kl / tokens, abs=1e-6)
    assert (first["step"], last["step"], last["eval"]) == (0, 1, True)
    assert (data / "out" / BASE_ANSWERS).is_file()
    lines = (data / "out/behaviour/step-000001.jsonl").read_text().splitlines()
    pairs = [json.loads(line) for line in lines]
    assert [pair["answer"] for pair in pairs] == expected["answer"]
    assert [pair["base"] for pair in pairs] == expected["base"]
    assert [pair["messages"] for pair in pairs] == [prompt["messages"] for prompt in PROMPTS]
    assert [pair["stops"] for pair in pairs] == expected["stops"]
    assert [pair["tokens"] for pair in pairs] == expected["lengths"]
    assert pairs[0]["followed"] is None and pairs[1]["followed"] is False
    assert pairs[0].keys() == {
        *("id", "language", "kind", "messages", "constraints", "base", "answer"),
        *("followed", "base_followed", "stops", "tokens"),
    }
    of_base = (data / "out/behaviour/step-000000.jsonl").read_text().splitlines()
    assert [json.loads(line)["answer"] for line in of_base] == expected["base"]


def test_the_table_has_base_and_model_side_by_side(data):
    text = printed(data, "probe", "behaviour", "tuned", "--base", "base", *WORDS)
    for words in (
        "base answers 7 prompts",
        "tuned answers 7 prompts",
        "loss on the base's answers",
        "KL(base || model)",
        "instructions followed",
        "answers with a whole sentence",
        "answers that end by themselves",
        "what is under the tower",
    ):
        assert words in text


def test_a_model_alone_has_only_the_measures_of_its_answers(data):
    text = printed(data, "probe", "behaviour", "base", *WORDS)
    assert "tokens of an answer" in text and "loss on the base" not in text
    (line,) = json.loads(printed(data, "probe", "behaviour", "base", *WORDS, "--json"))["lines"]
    assert [key for key in line if key.startswith("behaviour/")] == [
        f"behaviour/{key}" for key in ("instructions", "sentences", "stops", "length")
    ]
    assert "behaviour_tokens" not in line


def test_built_in_prompts_are_chosen_by_language_and_number(data):
    settings = Behaviour(languages=["zh"], num_prompts=6, max_new_tokens=2)
    notes = []
    (probed,) = probe_behaviour(str(data / "base"), None, settings, output=None, note=notes.append)
    pairs = probed.result.pairs
    assert 0 < len(pairs) <= 6 and {pair.prompt.language for pair in pairs} == {"zh"}
    assert notes[-1].endswith(f"answers {len(pairs)} prompts")


def test_models_that_cannot_be_compared_are_refused_together(data, tmp_path, capsys):
    shutil.copytree(data / "base", tmp_path / "mute")
    (tmp_path / "mute/chat_template.jinja").unlink()
    other = tmp_path / "mute/tokenizer.json"
    spoken = json.loads(other.read_text())
    vocabulary = spoken["model"]["vocab"]
    vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]
    other.write_text(json.dumps(spoken))
    words = ["probe", "behaviour", str(tmp_path / "mute"), "--base", str(data / "base")]
    assert main([*words, "--output", str(tmp_path / "out")]) == 2
    said = capsys.readouterr().err
    assert "no chat template is in the tokenizer of" in said
    assert "have different tokenizers" in said and "Traceback" not in said
    assert not Path(tmp_path / "out").exists()
    with pytest.raises(SystemExit):
        main(["probe", "behaviour", "base", "--languages", "en,fr"])
    assert "en,fr names fr; give one or more of en,zh" in capsys.readouterr().err
