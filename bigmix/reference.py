"""A micro-batch and a frozen model go in; out come its tensors with what the frozen model thinks of chosen sources.

Letters beside those of `records`: S sources, U rows that the frozen model is shown.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

from bigmix.data.records import Ints, MicroBatch
from bigmix.model.causal_lm import FrozenModel, ModelTensors, ReferenceTensors
from bigmix.model.engine import Frozen
from bigmix.model.inputs import move, runs, table, tensors
from bigmix.weighing import Floats


@dataclass(frozen=True, kw_only=True, slots=True)
class Anchor:
    """The model that a run stays near to, and the weight of the divergence for each source that does."""

    model: FrozenModel
    engine: Frozen
    weights: Mapping[str, float]


def rows_of_sources(micro_batch: MicroBatch, chosen_S: Sequence[bool]) -> Ints:
    """The rows [U] of the chosen sources; a row is of one source, that of its first part."""
    rows, tokens = micro_batch.ids_BT.shape
    first_B = np.searchsorted(micro_batch.starts_P, np.arange(rows) * tokens)
    return np.flatnonzero(np.asarray(chosen_S)[micro_batch.groups_P[first_B]])


def tensors_with_reference(
    micro_batch: MicroBatch,
    rows_U: Ints,
    anchor: Anchor,
    *,
    coefficients_S: Sequence[float],
    divergences_S: Sequence[float],
    device: torch.device,
    weights_P: Floats | None,
) -> ModelTensors:
    """A micro-batch on the device whose first loss tokens are those of `rows_U`, with the frozen model's hidden states.

    `divergences_S`: the coefficient of one token's KL, by source. A collective where the frozen model is sharded: a
    rank without such rows shows it one in vain.
    """
    row_tokens = micro_batch.ids_BT.shape[1]
    begins_K, lengths_K = micro_batch.begins_K, micro_batch.lengths_K
    is_of_rows_K = np.isin(begins_K // row_tokens, rows_U)
    order_K = np.argsort(~is_of_rows_K, kind="stable")
    ordered = replace(micro_batch, begins_K=begins_K[order_K], lengths_K=lengths_K[order_K])
    batch = tensors(ordered, coefficients_S, device, weights_P)
    shown_U = move(rows_U if len(rows_U) else np.zeros(1, np.int64), device)
    hidden_UTD = anchor.engine.forward(batch.ids_BT[shown_U], batch.positions_BT[shown_U])
    own_K = begins_K[is_of_rows_K]
    places_K = np.searchsorted(rows_U, own_K // row_tokens) * row_tokens + own_K % row_tokens
    count = int(lengths_K[is_of_rows_K].sum())
    places_X, _ = runs(move(places_K, device), move(lengths_K[is_of_rows_K], device), count)
    return replace(
        batch,
        reference=ReferenceTensors(
            hidden_KD=hidden_UTD.flatten(0, 1)[places_X],
            coefficients_K=table(divergences_S, device)[batch.tokens.groups_N[:count]],
            rule=anchor.model.rule,
            head=lambda: anchor.engine.gathered(anchor.model.head),
        ),
    )
