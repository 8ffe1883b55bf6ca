"""Weights are written file by file, under the names and with the index that loaders look for."""

import json

import torch
from safetensors import safe_open
from safetensors.torch import load_file
from support.models import FAMILIES
from transformers import AutoConfig, AutoModelForCausalLM

from bigmix.model.export import INDEX, WHOLE, WeightFiles, write_shards

SIZES = {"a": 10, "b": 10, "large": 100, "c": 10}  # of 4 bytes


def tensors():
    return {name: torch.arange(size, dtype=torch.float32) for name, size in SIZES.items()}


def test_a_file_has_what_fits_and_the_index_says_where_each_tensor_is(tmp_path):
    write_shards(tmp_path, tensors().items(), max_bytes=100)
    groups = [["a", "b"], ["large"], ["c"]]
    names = [f"model-{number:05d}-of-00003.safetensors" for number in (1, 2, 3)]
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([*names, INDEX])
    for name, group in zip(names, groups, strict=True):
        found = load_file(tmp_path / name)
        assert list(found) == group
        assert all(torch.equal(found[key], tensors()[key]) for key in group)
        with safe_open(tmp_path / name, framework="pt") as file:
            assert file.metadata() == {"format": "pt"}
    index = json.loads((tmp_path / INDEX).read_text())
    assert index == {
        "metadata": {"total_size": 4 * sum(SIZES.values())},
        "weight_map": {
            key: name for name, group in zip(names, groups, strict=True) for key in group
        },
    }
    assert list(index["weight_map"]) == sorted(SIZES)


def test_one_file_needs_no_index(tmp_path):
    write_shards(tmp_path, tensors().items(), max_bytes=1000)
    assert [path.name for path in tmp_path.iterdir()] == [WHOLE]
    files = WeightFiles(tmp_path)
    assert sorted(files.names) == sorted(SIZES) and files.describe("large").shape == (100,)
    files.close()


def test_a_file_is_on_disk_before_more_than_the_next_tensor_is_made(tmp_path):
    written = []

    def made():
        for name, tensor in tensors().items():
            written.append(len(list(tmp_path.glob("part-*"))))
            yield name, tensor

    write_shards(tmp_path, made(), max_bytes=1)
    assert written == [0, 0, 1, 2]


def test_several_files_load_as_one_model(tmp_path):

    settings = dict(FAMILIES["llama"])
    config = AutoConfig.for_model(settings.pop("model_type"), **settings)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config)
    config.save_pretrained(tmp_path)
    write_shards(tmp_path, model.state_dict().items(), max_bytes=20_000)
    assert (tmp_path / INDEX).is_file()
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path).state_dict()
    assert all(torch.equal(loaded[name], weight) for name, weight in model.state_dict().items())
