"""Moves micro-batches to the device, with the hidden states of the reference where there is one.

Nothing here waits for the device. Letters besides those of `data.records`: S sources, U rows that
the reference sees.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from bigmix.data.records import MicroBatch
from bigmix.loss.terms import LossTokens
from bigmix.model.causal_lm import InferenceLM, ModelTensors, ReferenceTensors
from bigmix.model.engine import InferenceEngine
from bigmix.types import Floats, Ints


def to_device(
    micro_batch: MicroBatch,
    coefficients_G: Sequence[float],
    device: torch.device,
    weights_P: Floats | None = None,
) -> ModelTensors:
    """A micro-batch on the device; the coefficient of a loss token is that of its group, times the
    weight of its part where there are weights.
    """
    ids_BT, starts_P = (
        array_to_device(micro_batch.ids_BT, device),
        array_to_device(micro_batch.starts_P, device),
    )
    lengths_P = torch.diff(starts_P, append=starts_P.new_full((1,), ids_BT.numel()))
    positions_X, part_X = runs(torch.zeros_like(starts_P), lengths_P, ids_BT.numel())
    num_kept = int(micro_batch.lengths_K.sum())
    begins_K, lengths_K = (
        array_to_device(micro_batch.begins_K, device),
        array_to_device(micro_batch.lengths_K, device),
    )
    kept_N, _ = runs(begins_K, lengths_K, num_kept)
    groups_N = array_to_device(micro_batch.groups_P, device)[part_X[kept_N]]
    coefficients_N = numbers_to_device(coefficients_G, device)[groups_N]
    if weights_P is not None:
        coefficients_N *= numbers_to_device(weights_P.tolist(), device)[part_X[kept_N]]
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


def array_to_device(array: Ints, device: torch.device) -> Tensor:
    """An integer array as int64 on the device."""
    return torch.from_numpy(array).to(device, non_blocking=True).long()


def numbers_to_device(numbers: Sequence[float], device: torch.device) -> Tensor:
    """A few numbers as fp32 on the device."""
    return torch.tensor(numbers, dtype=torch.float32, device=device)


def runs(begins_K: Tensor, lengths_K: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Runs of consecutive numbers laid end to end, and the run of each number.

    Run k is begins_K[k], begins_K[k] + 1, ...; `count` is the sum of lengths_K. Begins 4 and 9 with
    lengths 2 and 3 give 4, 5, 9, 10, 11 and 0, 0, 1, 1, 1.
    """
    # Without the size, torch would wait for the device to learn it.
    run_X = torch.repeat_interleave(lengths_K, output_size=count)
    shifts_K = begins_K - lengths_K.cumsum(0) + lengths_K
    return torch.arange(count, device=begins_K.device) + shifts_K[run_X], run_X


@dataclass(frozen=True, kw_only=True, slots=True)
class ReferenceModel:
    """The frozen model of a KL term, and the weight of the term for each source that has one."""

    model: InferenceLM
    engine: InferenceEngine
    weights: Mapping[str, float]


def rows_of_sources(micro_batch: MicroBatch, chosen_S: Sequence[bool]) -> Ints:
    """The rows [U] of the chosen sources; the source of a row is that of its first part."""
    num_rows, num_tokens = micro_batch.ids_BT.shape
    first_B = np.searchsorted(micro_batch.starts_P, np.arange(num_rows) * num_tokens)
    return np.flatnonzero(np.asarray(chosen_S)[micro_batch.groups_P[first_B]])


def to_device_with_reference(
    micro_batch: MicroBatch,
    rows_U: Ints,
    reference: ReferenceModel,
    *,
    coefficients_S: Sequence[float],
    divergences_S: Sequence[float],
    device: torch.device,
    weights_P: Floats | None,
) -> ModelTensors:
    """A micro-batch on the device whose first loss tokens are those of `rows_U`, with the hidden
    states of the reference for them.

    `divergences_S` is the coefficient of one token's KL, by source. A collective where the
    reference is sharded: a rank without such rows runs it on one row and uses nothing of it.
    """
    num_row_tokens = micro_batch.ids_BT.shape[1]
    begins_K, lengths_K = micro_batch.begins_K, micro_batch.lengths_K
    is_of_rows_K = np.isin(begins_K // num_row_tokens, rows_U)
    order_K = np.argsort(~is_of_rows_K, kind="stable")
    ordered = replace(micro_batch, begins_K=begins_K[order_K], lengths_K=lengths_K[order_K])
    batch = to_device(ordered, coefficients_S, device, weights_P)
    shown_U = array_to_device(rows_U if len(rows_U) else np.zeros(1, np.int64), device)
    hidden_UTD = reference.engine.forward(batch.ids_BT[shown_U], batch.positions_BT[shown_U])
    own_K = begins_K[is_of_rows_K]
    row_K = np.searchsorted(rows_U, own_K // num_row_tokens)
    places_K = row_K * num_row_tokens + own_K % num_row_tokens
    num_kept = int(lengths_K[is_of_rows_K].sum())
    places_X, _ = runs(
        array_to_device(places_K, device),
        array_to_device(lengths_K[is_of_rows_K], device),
        num_kept,
    )
    return replace(
        batch,
        reference=ReferenceTensors(
            hidden_KD=hidden_UTD.flatten(0, 1)[places_X],
            coefficients_K=numbers_to_device(divergences_S, device)[
                batch.tokens.groups_N[:num_kept]
            ],
            rule=reference.model.rule,
            head=lambda: reference.engine.gathered(reference.model.head),
        ),
    )
