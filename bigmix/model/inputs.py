"""A micro-batch goes in, its tensors on the device of the model come out; nothing waits for the device."""

from collections.abc import Sequence

import torch
from torch import Tensor

from bigmix.data.records import Ints, MicroBatch
from bigmix.loss.terms import LossTokens
from bigmix.model.causal_lm import ModelTensors
from bigmix.weighing import Floats


def tensors(
    micro_batch: MicroBatch,
    coefficients_G: Sequence[float],
    device: torch.device,
    weights_P: Floats | None = None,
) -> ModelTensors:
    """A micro-batch on the device, each loss token with the coefficient of its group, times the weight of its part."""
    ids_BT, starts_P = move(micro_batch.ids_BT, device), move(micro_batch.starts_P, device)
    lengths_P = torch.diff(starts_P, append=starts_P.new_full((1,), ids_BT.numel()))
    positions_X, part_X = runs(torch.zeros_like(starts_P), lengths_P, ids_BT.numel())
    num_kept = int(micro_batch.lengths_K.sum())
    begins_K, lengths_K = move(micro_batch.begins_K, device), move(micro_batch.lengths_K, device)
    kept_N, _ = runs(begins_K, lengths_K, num_kept)
    groups_N = move(micro_batch.groups_P, device)[part_X[kept_N]]
    coefficients_N = table(coefficients_G, device)[groups_N]
    if weights_P is not None:
        coefficients_N *= table(weights_P.tolist(), device)[part_X[kept_N]]
    return ModelTensors(
        ids_BT=ids_BT,
        positions_BT=positions_X.view_as(ids_BT),
        tokens=LossTokens(
            positions_N=kept_N,
            labels_N=ids_BT.flatten()[kept_N + 1],
            groups_N=groups_N,
            coefficients_N=coefficients_N,
            num_groups=len(coefficients_G),
        ),
    )


def move(array: Ints, device: torch.device) -> Tensor:
    """Whole numbers as int64 on the device."""
    return torch.from_numpy(array).to(device, non_blocking=True).long()


def table(numbers: Sequence[float], device: torch.device) -> Tensor:
    """A few numbers as fp32 on the device."""
    return torch.tensor(numbers, dtype=torch.float32, device=device)


def runs(begins_K: Tensor, lengths_K: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Runs of numbers laid end to end, begins_K[k], begins_K[k] + 1, ..., `count` in all, and the run of each."""
    # With the size given, the device is not waited for.
    run_X = torch.repeat_interleave(lengths_K, output_size=count)
    shifts_K = begins_K - lengths_K.cumsum(0) + lengths_K
    return torch.arange(count, device=begins_K.device) + shifts_K[run_X], run_X
