"""A model that is not trained has the weights that transformers loads, and no gradients."""

import shutil

import pytest
import torch
import transformers
from support.models import FAMILIES

from bigmix.errors import BadInput
from bigmix.loss.requests import LossBackendOptions
from bigmix.loss.torch_kernel import torch_backend
from bigmix.model.causal_lm import read_config
from bigmix.model.loading import (
    DevicePlacement,
    ModelSource,
    open_evaluated,
    open_reference,
    open_whole,
)
from bigmix.recipe import Recipe

CPU = torch.device("cpu")
PLACEMENT = DevicePlacement(keys={"zero_optimization": {"stage": 1}}, dtype="fp32", device=CPU)
IDS = torch.arange(3, 23)[None]
POSITIONS = torch.arange(20)[None]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model in bf16, with its weights drawn at random."""
    path = tmp_path_factory.mktemp("models") / "llama"
    settings = dict(FAMILIES["llama"])
    config = transformers.AutoConfig.for_model(settings.pop("model_type"), **settings)
    torch.manual_seed(0)
    transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(
        path
    )
    return path


@pytest.fixture
def recipe():
    source = {"path": "data/web", "share": 1, "role": "replay"}
    return Recipe.model_validate(
        {
            "model": {"path": "runs/base"},
            "sequence_length": 64,
            "rows_per_step": 8,
            "train": {"lr": 1e-3},
            "sources": {"web": source},
            "budget": {"steps": 1},
            "output": "runs/one",
        }
    )


def source_of(folder):
    return ModelSource(
        path=str(folder), config=read_config(str(folder), None), named="reference.model"
    )


def plain(folder):
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def test_a_reference_gives_the_hidden_states_of_its_folder(folder, recipe):
    reference = open_reference(source_of(folder), recipe, PLACEMENT, {"web": 0.3})
    with torch.no_grad():
        expected = plain(folder).model(input_ids=IDS).last_hidden_state
    assert torch.equal(reference.engine.forward(IDS, POSITIONS), expected)
    assert reference.weights == {"web": 0.3}
    assert not any(weight.requires_grad for weight in reference.model.parameters())


def test_an_evaluated_model_has_the_weights_of_its_folder_and_no_gradients(folder, recipe):
    options = LossBackendOptions(backend=torch_backend)
    engine = open_evaluated(source_of(folder), recipe, PLACEMENT, options)
    expected = plain(folder).state_dict()
    found = engine.module.lm.state_dict()
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], weight) for name, weight in expected.items())
    assert not engine.module.training
    assert not any(weight.requires_grad for weight in engine.module.parameters())


@pytest.mark.parametrize(
    ("dtype", "expected"),
    [("auto", torch.bfloat16), ("fp32", torch.float32), ("bf16", torch.bfloat16)],
)
def test_a_whole_model_has_the_requested_precision(dtype, expected, folder):
    lm = open_whole(folder, dtype=dtype, device=CPU)
    assert lm.dtype == expected and not lm.training
    stored = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=expected).eval()
    with torch.no_grad():
        assert torch.equal(lm(input_ids=IDS).logits, stored(input_ids=IDS).logits)


def test_a_folder_without_weights_is_refused(folder, tmp_path):
    bare = shutil.copytree(
        folder, tmp_path / "bare", ignore=shutil.ignore_patterns("*.safetensors")
    )
    with pytest.raises(BadInput, match="bare cannot be loaded .* give the folder or the hub name"):
        open_whole(bare, dtype="auto", device=CPU)
