"""Gradients under ZeRO-3 equal a dense fp64 reference, whatever the ranks, the accumulation and the packing."""

import pytest
from ranks import run_on_ranks


@pytest.mark.parametrize(
    ("ranks", "families"),
    [
        (1, ["llama"]),
        (2, ["llama"]),
        pytest.param(2, ["qwen", "gpt2", "gemma"], marks=pytest.mark.slow),
    ],
)
def test_gradients_equal_a_dense_reference(ranks, families, tmp_path):
    for errors in run_on_ranks("gradient_errors", ranks, tmp_path, {"families": families}):
        for case, (gradient, nll) in errors.items():
            assert gradient < 1e-5, case
            assert nll < 1e-5, case
