"""Gradients under ZeRO-3 equal a dense fp64 reference, whatever the ranks, the accumulation and the
packing.
"""

import json
from pathlib import Path

import pytest
from support.ranks import run_on_ranks

BLOCKS = {
    "llama": "LlamaDecoderLayer",
    "qwen": "Qwen2DecoderLayer",
    "gpt2": "GPT2Block",
    "gemma": "Gemma2DecoderLayer",
}


@pytest.mark.parametrize(
    ("ranks", "families"),
    [
        pytest.param(1, ["llama"], marks=pytest.mark.slow),
        (2, ["llama"]),
        pytest.param(2, ["qwen", "gpt2", "gemma"], marks=pytest.mark.slow),
    ],
)
def test_gradients_equal_a_dense_reference(ranks, families, tmp_path):
    for errors in run_on_ranks("gradient_errors", ranks, tmp_path, {"families": families}):
        for case, (gradient, nll) in errors.items():
            assert gradient < 1e-5, case
            assert nll < 1e-5, case


@pytest.mark.parametrize(
    ("ranks", "families", "other", "file"),
    [
        (2, ["llama"], "gpt2", "ds_configs/cpu.json"),
        pytest.param(2, ["qwen", "gemma"], "gemma", "ds_configs/cpu.json", marks=pytest.mark.slow),
        pytest.param(2, ["llama"], "qwen", "ds_configs/zero1.json", marks=pytest.mark.slow),
    ],
)
def test_every_term_of_the_objective_equals_a_dense_reference(
    ranks, families, other, file, tmp_path
):
    """Smoothing, z-loss, a cap, KL to a frozen model of another family; recomputed layers, ranks
    without such rows.
    """
    arguments = {"families": families, "other": other, "file": file}
    for errors in run_on_ranks("whole_objective_errors", ranks, tmp_path, arguments):
        for case, (gradient, kl, kl_of_others) in errors.items():
            assert gradient < 1e-5, case
            assert kl < 1e-6, case
            assert kl_of_others == 0, case


def test_the_head_is_gathered_once_for_each_micro_batch(tmp_path):
    for counts in run_on_ranks("gathers_of_the_head", 2, tmp_path, {"family": "llama"}):
        assert counts[1:] == [4, 4]


@pytest.mark.slow
def test_weights_are_gathered_by_layers_unless_the_file_decides(tmp_path):
    keys = json.loads(Path("ds_configs/cpu.json").read_text())
    keys["zero_optimization"]["leaf_module"] = {"classes": ["LlamaMLP"]}
    own = tmp_path / "own.json"
    own.write_text(json.dumps(keys))
    for file, layers in (("ds_configs/cpu.json", BLOCKS), (str(own), {"llama": "LlamaMLP"})):
        arguments = {"families": list(layers), "file": file}
        (found,) = run_on_ranks("units_of_gathering", 1, tmp_path, arguments)
        for family, name in layers.items():
            trained, frozen = found[family]
            assert set(trained) == {name} and trained == frozen


def test_each_weight_can_be_gathered_after_an_evaluation(tmp_path):
    """ZeRO-3 is fetching one for the backward of training as the last forward ends."""
    keys = json.loads(Path("ds_configs/cpu.json").read_text())
    keys["zero_optimization"]["stage3_prefetch_bucket_size"] = 10_000
    own = tmp_path / "own.json"
    own.write_text(json.dumps(keys))
    for ranks in (1, 2):
        found = run_on_ranks("weights_after_an_evaluation", ranks, tmp_path, {"file": str(own)})
        assert all(gathered == together for gathered, together in found)
