"""Every number of the probe is that of a plain loop over single prompts, on any ranks."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from support.chat_models import PROMPTS, by_loop, make, probe_of
from support.ranks import run_on_ranks
from transformers import AutoModelForCausalLM

from bigmix.cluster.collectives import Cluster
from bigmix.cluster.signals import UNWATCHED
from bigmix.cluster.world import World
from bigmix.errors import BadInput
from bigmix.evaluation.behaviour.answers import Respondent
from bigmix.evaluation.behaviour.baseline import parse_base_answers, read_base_answers
from bigmix.evaluation.behaviour.measure import (
    behaviour_line,
    estimates_of,
    holds_sentence,
    measure_behaviour,
    notes_on_base,
)
from bigmix.evaluation.bootstrap import RESAMPLES
from bigmix.evaluation.tasks.inference_model import InferenceModel
from bigmix.seeding import key_of

MODULE = "support.workers.behaviour"
KEYS = ("loss", "forgetting", "kl", "instructions", "sentences", "stops", "length", "same")


@pytest.fixture(scope="module")
def data(tmp_path_factory, tiny_tokenizer):
    return make(tmp_path_factory.mktemp("behaviour"), tiny_tokenizer)


def asked(data, ranks, modes, batch_rows=3):
    given = {"folder": str(data), "batch_rows": batch_rows, "modes": modes}
    return run_on_ranks("behaviours", ranks, data, given, module=MODULE)


@pytest.fixture(scope="module")
def alone(data):
    """What one rank finds; the base's answers are then in the folder."""
    (found,) = asked(data, 1, ["whole"])
    return found["whole"]


@pytest.fixture(scope="module")
def expected(data, alone):
    return {name: by_loop(data, name) for name in ("base", "tuned")}


def expected_numbers(found, followed):
    """The measures as quotients of sums over prompts: {key: (above [D], below [D])}."""
    tokens, nll, base_nll, kl = np.array(found["sums"]).T
    ones = np.ones(len(tokens))
    constrained = np.array(["constraints" in prompt for prompt in PROMPTS], float)
    return {
        "loss": (nll, tokens),
        "forgetting": (nll - base_nll, tokens),
        "kl": (kl, tokens),
        "instructions": (np.array([bool(each) for each in followed], float), constrained),
        "sentences": (np.array([holds_sentence(text) for text in found["answer"]], float), ones),
        "stops": (np.array(found["stops"], float), ones),
        "length": (np.array(found["lengths"], float), ones),
        "same": (np.equal(found["base"], found["answer"]).astype(float), ones),
    }


def expected_line(found, followed):
    line = {}
    for key, (above, below) in expected_numbers(found, followed).items():
        line[f"behaviour/{key}"] = above.sum() / below.sum()
        draws = np.random.default_rng(key_of("interval", "behaviour"))
        values = []
        for _ in range(RESAMPLES):
            drawn = draws.integers(0, len(above), len(above))
            if below[drawn].sum():
                values.append(above[drawn].sum() / below[drawn].sum())
        low, high = np.quantile(values, [0.025, 0.975])
        line |= {f"behaviour_low/{key}": low, f"behaviour_high/{key}": high}
    return line | {
        "behaviour_prompts": len(PROMPTS),
        "behaviour_constrained": sum("constraints" in prompt for prompt in PROMPTS),
        "behaviour_tokens": int(np.array(found["sums"])[:, 0].sum()),
    }


def close_to(line):
    return {key: pytest.approx(value, rel=1e-6, abs=1e-6) for key, value in line.items()}


@pytest.mark.parametrize("name", ["base", "tuned"])
def test_answers_and_numbers_are_those_of_a_loop_over_single_prompts(alone, expected, name):
    found = alone[name]
    for key in ("base", "answer", "stops", "lengths"):
        assert found[key] == expected[name][key]
    assert found["line"] == close_to(expected_line(expected[name], found["followed"]))
    assert [key for key in found["line"] if key.startswith("behaviour/")] == [
        f"behaviour/{key}" for key in KEYS
    ]


def test_the_tuned_model_has_forgotten_how_to_answer(alone):
    base, tuned = alone["base"]["line"], alone["tuned"]["line"]
    assert tuned["behaviour/forgetting"] > 0.1 and tuned["behaviour/kl"] > 0.01
    assert tuned["behaviour/same"] < 1 and tuned["behaviour/length"] < base["behaviour/length"]
    assert tuned["behaviour/sentences"] < base["behaviour/sentences"]
    assert 0 < base["behaviour/stops"] <= 1 and 0 < base["behaviour/instructions"] < 1
    assert alone["rest"] == pytest.approx(1, abs=1e-6)


def test_a_base_that_is_measured_again_is_the_same_to_the_last_bit(alone):
    assert alone["again"] == alone["base"]
    line = alone["base"]["line"]
    for key in ("forgetting", "kl"):
        assert [line[f"behaviour{end}/{key}"] for end in ("", "_low", "_high")] == [0, 0, 0]
    assert line["behaviour/same"] == 1
    assert alone["is_stopped"]


@pytest.mark.parametrize("ranks", [2, pytest.param(3, marks=pytest.mark.slow)])
def test_numbers_are_the_same_on_any_ranks_and_however_weights_are_held(data, alone, ranks):
    modes = ["whole", "sharded"]
    for of_rank in asked(data, ranks, modes, batch_rows=2):
        for weights in modes:
            found = of_rank[weights]
            assert found["fingerprint"] == alone["fingerprint"] and found["is_stopped"]
            for name in ("base", "again", "tuned"):
                assert found[name] == alone[name] | {"line": close_to(alone[name]["line"])}


@pytest.fixture(scope="module")
def plain(data, alone):
    """The tuned model as it is on disk, and the base's answers as they are on disk."""
    lm = AutoModelForCausalLM.from_pretrained(data / "tuned").eval()
    respondent = Respondent(
        model=InferenceModel(lm=lm, device=torch.device("cpu")),
        cluster=Cluster(World(rank=0, local_rank=0, size=1, local_size=1)),
        activity=UNWATCHED,
    )
    return respondent, parse_base_answers(read_base_answers(data), alone["fingerprint"])


def test_a_model_on_disk_measures_the_same_from_the_file_of_the_base(data, alone, plain):
    respondent, base = plain
    result = measure_behaviour(respondent, probe_of(data), base)
    assert behaviour_line(result) == close_to(alone["tuned"]["line"])
    assert [pair.answer.text for pair in result.pairs] == alone["tuned"]["answer"]
    changes = estimates_of(result.change)
    for key, before in estimates_of(result.base).items():
        assert before.value == alone["base"]["line"][f"behaviour/{key}"]
        change = alone["tuned"]["line"][f"behaviour/{key}"] - before.value
        assert changes[key].value == pytest.approx(change)
        assert changes[key].low <= changes[key].value <= changes[key].high


def test_answers_of_another_template_are_refused_and_other_prompts_reported(data, plain):
    _, base = plain
    probe = probe_of(data)
    assert list(notes_on_base(probe, base)) == []
    (note,) = notes_on_base(probe_of(data, num_prompts=2), base)
    assert "the 7 prompts and the max_new_tokens of 12 of the first evaluation" in note
    other = replace(probe, template=replace(probe.template, source="{{ messages }}"))
    with pytest.raises(BadInput, match="its chat template is not the one that the base answered"):
        list(notes_on_base(other, base))


def test_without_a_base_only_the_answers_are_measured(data, alone, plain):
    respondent, _ = plain
    result = measure_behaviour(respondent, probe_of(data), None)
    line = behaviour_line(result)
    left_out = ("loss", "forgetting", "kl", "same", "tokens")
    assert line == close_to(
        {
            key: value
            for key, value in alone["tuned"]["line"].items()
            if not key.endswith(tuple(f"{end}{key}" for key in left_out for end in "/_"))
        }
    )
    assert (result.base, result.change, result.pairs[0].base) == (None, None, None)


@pytest.mark.parametrize(
    ("text", "is_sentence"),
    [
        ("The capital of France is Paris.", True),
        ("Paris", False),
        ("Paris.", False),
        ("capital of France", False),
        ("1. Paris\n2. Rome\n3. Berlin", False),
        ("3 + 4 = 7.", False),
        ("Sure! Here is a list:\n- one", False),
        ('He said "It is so."', True),
        ("It's **bright here.**", True),
        ("The value is 3.5 and", False),
        ("法国的首都是巴黎。", True),
        ("巴黎。", False),
        ("我用 Python 写。", True),
        ("```python\nprint('The river is bright.')\n```", False),
        ("", False),
    ],
)
def test_a_sentence_has_words_and_an_end(text, is_sentence):
    assert holds_sentence(text) == is_sentence


def test_one_prompt_has_no_interval(data, plain):
    respondent, _ = plain
    line = behaviour_line(measure_behaviour(respondent, probe_of(data, num_prompts=1), None))
    assert math.isnan(line["behaviour_low/length"]) and line["behaviour_prompts"] == 1
    assert "behaviour/instructions" not in line and line["behaviour_constrained"] == 0
