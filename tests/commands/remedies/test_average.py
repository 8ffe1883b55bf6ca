"""An average is that of the dense weights, and the model itself at weight 0 and 1."""

import json
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file
from support.models import FAMILIES

from bigmix.commands.main import main
from bigmix.commands.remedies.average import members_of
from bigmix.model.export import WeightFiles


def write_model(folder, family="llama", seed=0, dtype=torch.float32, **changes):
    """A folder with a model of random weights, in several files."""
    torch.manual_seed(seed)
    settings = FAMILIES[family] | changes
    config = transformers.AutoConfig.for_model(settings.pop("model_type"), **settings)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=dtype)
    model.save_pretrained(folder, max_shard_size="20KB")
    return model


def average(folder, *words):
    return main(["average", *(str(folder / word) if word.isalpha() else word for word in words)])


def tensors(folder):
    return {name: t for path in folder.glob("*.safetensors") for name, t in load_file(path).items()}


@pytest.mark.parametrize("family", ["llama", "qwen"])  # untied and tied
def test_an_average_is_that_of_the_dense_weights(family, tmp_path):
    base, tuned = (write_model(tmp_path / n, family, s) for n, s in (("base", 0), ("tuned", 1)))
    (tmp_path / "tuned/chat_template.jinja").write_text("{{ messages }}")
    (tmp_path / "tuned/pytorch_model.bin").write_bytes(b"old")
    words = ["base", "tuned", "--weight", "0.3", "--shard-gib", "2e-5", "--output", "out"]
    assert average(tmp_path, *words) == 0
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    own, other = dict(base.named_parameters()), dict(tuned.named_parameters())
    for name, weight in loaded.named_parameters():
        expected = 0.7 * own[name].double() + 0.3 * other[name].double()
        assert torch.allclose(weight.double(), expected, rtol=0, atol=1e-7), name
    assert len(list((tmp_path / "out").glob("model-*-of-*.safetensors"))) > 1
    assert (tmp_path / "out/chat_template.jinja").read_text() == "{{ messages }}"
    assert not (tmp_path / "out/pytorch_model.bin").exists()
    card = (tmp_path / "out/README.md").read_text()
    assert f"| {tmp_path / 'tuned'} | 0.3 |" in card and "--weight 0.3" in card
    assert not list(tmp_path.glob(".tmp*"))


@pytest.mark.parametrize("weight", ["0", "1"])
def test_at_its_ends_it_is_a_model_bit_for_bit(weight, tmp_path):
    for name, seed in (("base", 0), ("tuned", 1)):
        write_model(tmp_path / name, seed=seed, dtype=torch.bfloat16)
    assert average(tmp_path, "base", "tuned", "--weight", weight, "--output", "out") == 0
    expected, found = tensors(tmp_path / ["base", "tuned"][int(weight)]), tensors(tmp_path / "out")
    assert found.keys() == expected.keys()
    assert all(
        torch.equal(found[n].view(torch.int16), t.view(torch.int16)) for n, t in expected.items()
    )
    assert json.loads((tmp_path / "out/config.json").read_text())["dtype"] == "bfloat16"


def test_three_models_of_two_dtypes(tmp_path):
    write_model(tmp_path / "base", seed=0)
    write_model(tmp_path / "one", seed=1, dtype=torch.bfloat16)
    write_model(tmp_path / "two", seed=2, dtype=torch.bfloat16)
    words = ["base", "one", "two", "--weight", "0.25", "--weight", "0.5", "--output", "out"]
    assert average(tmp_path, *words) == 0
    base, one, two, out = (tensors(tmp_path / name) for name in ("base", "one", "two", "out"))
    for name, found in out.items():
        expected = 0.25 * base[name].double() + 0.25 * one[name].double() + 0.5 * two[name].double()
        assert found.dtype == torch.float32
        assert torch.allclose(found.double(), expected, rtol=0, atol=1e-7)


def test_every_difference_is_named(tmp_path, capsys):
    write_model(tmp_path / "base")
    write_model(tmp_path / "tuned", vocab_size=128, num_hidden_layers=1, tie_word_embeddings=True)
    assert average(tmp_path, "base", "tuned", "--weight", "0.5", "--output", "out") == 2
    message = capsys.readouterr().err
    for part in (
        "vocab_size is 96",
        "num_hidden_layers is 2",
        "tie_word_embeddings is False",
        "has no lm_head.weight, model.layers.1.",
        "model.embed_tokens.weight ([96, 32] and [128, 32])",
    ):
        assert part in message, message
    assert not (tmp_path / "out").exists()


def test_a_sum_that_is_above_one_by_rounding_alone_is_one():
    first, *others = members_of([Path("a")] * 4, [0.33, 0.56, 0.11])
    assert first.weight == 0 and [m.weight for m in others] == [0.33, 0.56, 0.11]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["base", "tuned", "--weight", "1.5"], "--weight is 1.5, each must be from 0 to 1"),
        (["base", "tuned", "--weight", "0.5", "--weight", "0.1"], "--weight has 2 numbers for 1"),
        (["base", "nothing", "--weight", "0.5"], "nothing is no folder, and the hub has no such"),
    ],
)
def test_what_is_no_average_is_refused(words, message, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    for name in ("base", "tuned"):
        (tmp_path / name).mkdir()
    assert average(tmp_path, *words, "--output", "out") == 2
    assert message in capsys.readouterr().err


def test_a_file_that_the_index_names_must_be_there(tmp_path, capsys):
    write_model(tmp_path / "base")
    write_model(tmp_path / "tuned")
    sorted((tmp_path / "tuned").glob("*.safetensors"))[0].unlink()
    assert average(tmp_path, "base", "tuned", "--weight", "0.5", "--output", "out") == 2
    assert "has no model-00001-of-" in capsys.readouterr().err


def test_weights_are_described_without_being_read(tmp_path):
    write_model(tmp_path / "base", dtype=torch.bfloat16)
    files = WeightFiles(tmp_path / "base")
    found = files.describe("model.embed_tokens.weight")
    assert (found.dtype, found.shape) == ("BF16", (96, 32))
    files.close()
