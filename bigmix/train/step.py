"""One optimizer step, from the batch of each rank to moved weights.

Sums and counts are kept apart and divided once, with the counts of the whole step.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from bigmix.cluster.collectives import Cluster
from bigmix.data.batch import EXPONENTS, document_weights, weight_sums
from bigmix.data.quarantine import BadShard
from bigmix.data.records import MicroBatch, RankRows, StepBatch
from bigmix.loss.objective import Objective, StepShares, StepWeights, divergence_weights, weigh
from bigmix.loss.terms import Statistic
from bigmix.model.causal_lm import ModelTensors
from bigmix.model.engine import Engine
from bigmix.model.inputs import ReferenceModel, rows_of_sources, to_device, to_device_with_reference
from bigmix.types import Floats, Ints, Weighing


@dataclass(frozen=True, kw_only=True, slots=True)
class StepResult:
    """What a step did, over all ranks.

    `sums_SM` (see `GroupSums`), `gradient_norm`, `stopwatch` and `finite_M`, whether the loss of
    each micro-batch of this rank is finite, are on the device until they are read.
    """

    step: int
    lr: float
    rows: Mapping[str, int]
    substituted: Mapping[str, int]
    tokens: Mapping[str, int]
    loss_tokens: Mapping[str, int]
    sum_sq_lengths: int
    weights: StepWeights
    sums_SM: Tensor
    gradient_norm: Tensor | float
    finite_M: Tensor
    stopwatch: "Stopwatch"
    skipped: bool


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainingObjective:
    """What steps minimise: the objective, how the loss tokens of each source weigh among
    themselves, and the reference model of a KL term.
    """

    objective: Objective
    document_weights: Mapping[str, Weighing]
    reference: ReferenceModel | None

    @property
    def names(self) -> tuple[str, ...]:
        """The sources."""
        return tuple(self.document_weights)


@dataclass(frozen=True, kw_only=True, slots=True)
class _Coefficients:
    """What a loss token of each source is multiplied by in the objective."""

    nll_S: Sequence[float]
    divergence_S: Sequence[float]


@dataclass(frozen=True, kw_only=True, slots=True)
class WeighedMicroBatch:
    """A micro-batch with the weights of its documents, None where all weigh alike, and the rows
    that the reference model reads.
    """

    micro_batch: MicroBatch
    weights_P: Floats | None
    reference_rows_U: Ints


@dataclass(frozen=True, kw_only=True, slots=True)
class StepCounts:
    """A step's counts over all ranks; `reference_rows` are those of each micro-batch that the
    reference model reads.
    """

    loss_tokens: Mapping[str, int]
    tokens: Mapping[str, int]
    weight_sums: Mapping[str, float]
    reference_rows: Sequence[int]
    sum_sq_lengths: int


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainableStep:
    """A step for which every rank has a batch: this rank's batch, its micro-batches with their
    weights, and the counts over all ranks.
    """

    batch: StepBatch
    micro_batches: Sequence[WeighedMicroBatch]
    counts: StepCounts


@dataclass(frozen=True, kw_only=True, slots=True)
class SyncedBatch:
    """What all ranks know before a step.

    `ready` is None where any rank has no batch: since shards could not be read (`bad_shards`, of
    all ranks), or since a stop was requested.
    """

    ready: TrainableStep | None
    bad_shards: Sequence[BadShard] = ()


@dataclass(frozen=True, kw_only=True, slots=True)
class StepSettings:
    """The settings of one step.

    `dropout_seed` is of this rank and this step, so that a resumed run drops the units that an
    uninterrupted one does.
    """

    shares: StepShares
    lr: float
    dropout_seed: int


def sync(
    cluster: Cluster,
    batch: StepBatch | BadShard | None,
    objective: TrainingObjective,
    rank_rows: RankRows,
    *,
    stop: bool,
) -> SyncedBatch:
    """Agree on the next step: a collective, the one sum before the first forward.

    `batch` is what this rank has read: its batch, the shard that it could not read, or None where
    a stop was requested while it waited. A rank without a batch takes part as well; then no rank
    trains the step. `stop` is whether a stop was requested of this rank: if of any, none trains.
    """
    own = None if isinstance(batch, BadShard) else batch
    micro_batches = [] if own is None else [_weighed(m, objective) for m in own.micro_batches]
    counts = (
        [0.0] * _num_counts(objective, rank_rows)
        if own is None
        else _own_counts(own, micro_batches, objective.names)
    )
    stops, absent, *sums = cluster.sum_counts([stop, own is None, *counts])
    if stops:
        return SyncedBatch(ready=None)
    if own is None or absent:
        everywhere = cluster.gather(batch if isinstance(batch, BadShard) else None)
        return SyncedBatch(ready=None, bad_shards=[bad for bad in everywhere if bad is not None])
    step_counts = _step_counts(sums, objective.names)
    return SyncedBatch(
        ready=TrainableStep(batch=own, micro_batches=micro_batches, counts=step_counts)
    )


def run(
    engine: Engine,
    cluster: Cluster,
    ready: TrainableStep,
    objective: TrainingObjective,
    settings: StepSettings,
    on_activity: Callable[[str], None],
) -> StepResult:
    """One optimizer step on what the ranks have agreed on; a collective.

    `on_activity` is given what begins.
    """
    torch.manual_seed(settings.dropout_seed)
    watch = Stopwatch(engine.device)
    batch, counts = ready.batch, ready.counts
    weights = weigh(
        objective.objective, settings.shares, batch.rows, counts.loss_tokens, counts.weight_sums
    )
    coefficients = _coefficients(weights, ready, settings.shares, objective, cluster.world.size)
    place = f"of step {batch.step}, micro-batch"
    sums_SM = torch.zeros(len(batch.rows), len(Statistic), device=engine.device)
    finite: list[Tensor] = []
    for number, micro_batch in enumerate(ready.micro_batches, 1):
        watch.mark("other")
        on_activity(f"forward {place} {number}")
        reference = objective.reference if counts.reference_rows[number - 1] else None
        value, micro_SM = engine.forward(
            _on_device(micro_batch, coefficients, reference, engine.device)
        )
        sums_SM += micro_SM
        finite.append(value.detach().isfinite())
        watch.mark("forward")
        on_activity(f"backward {place} {number}")
        engine.backward(value)
        watch.mark("backward")
        on_activity(f"optimizer {place} {number}")
        engine.step_micro_batch(settings.lr)
        watch.mark("optimizer")
    skipped = engine.was_skipped()
    if not skipped:
        engine.zero_state.update_average()
        watch.mark("optimizer")
    return StepResult(
        step=batch.step,
        lr=settings.lr,
        rows=batch.rows,
        substituted=batch.substituted,
        tokens=counts.tokens,
        loss_tokens=counts.loss_tokens,
        sum_sq_lengths=counts.sum_sq_lengths,
        weights=weights,
        sums_SM=cluster.sum_tensor(sums_SM),
        gradient_norm=engine.gradient_norm(),
        finite_M=torch.stack(finite),
        stopwatch=watch,
        skipped=skipped,
    )


def _weighed(micro_batch: MicroBatch, objective: TrainingObjective) -> WeighedMicroBatch:
    exponents_S = [
        EXPONENTS[document_weights] for document_weights in objective.document_weights.values()
    ]
    referred = objective.reference.weights if objective.reference is not None else {}
    return WeighedMicroBatch(
        micro_batch=micro_batch,
        weights_P=document_weights(micro_batch, exponents_S) if any(exponents_S) else None,
        reference_rows_U=rows_of_sources(
            micro_batch, [name in referred for name in objective.names]
        ),
    )


def _num_counts(objective: TrainingObjective, rank_rows: RankRows) -> int:
    """How many numbers `_own_counts` gives."""
    return 1 + 3 * len(objective.names) + rank_rows.num_micro_batches


def _own_counts(
    batch: StepBatch, micro_batches: Sequence[WeighedMicroBatch], names: Sequence[str]
) -> Sequence[float]:
    """What this rank adds to the counts of the step, as `_step_counts` reads it."""
    weighed = [
        weight_sums(each.micro_batch, each.weights_P, len(names))
        for each in micro_batches
        if each.weights_P is not None
    ]
    loss_tokens = [batch.loss_tokens[name] for name in names]
    return [
        batch.sum_sq_lengths,
        *loss_tokens,
        *(batch.tokens[name] for name in names),
        *(np.sum(weighed, axis=0) if weighed else loss_tokens),
        *(len(each.reference_rows_U) for each in micro_batches),
    ]


def _step_counts(sums: Sequence[float], names: Sequence[str]) -> StepCounts:
    sum_sq_lengths, *rest = sums
    loss_tokens, tokens, mass = (
        dict(zip(names, rest[index * len(names) :], strict=False)) for index in range(3)
    )
    return StepCounts(
        loss_tokens={name: int(count) for name, count in loss_tokens.items()},
        tokens={name: int(count) for name, count in tokens.items()},
        weight_sums=mass,
        reference_rows=[int(count) for count in rest[3 * len(names) :]],
        sum_sq_lengths=int(sum_sq_lengths),
    )


def _coefficients(
    weights: StepWeights,
    ready: TrainableStep,
    shares: StepShares,
    objective: TrainingObjective,
    num_ranks: int,
) -> _Coefficients:
    kl_weights = objective.reference.weights if objective.reference is not None else {}
    rows = ready.batch.rows
    divergences = divergence_weights(kl_weights, shares, rows, ready.counts.loss_tokens)
    # ZeRO averages gradients over ranks; times the number of ranks, the mean is the step's sum
    # again.
    return _Coefficients(
        nll_S=[weights.token[name] * num_ranks for name in rows],
        divergence_S=[divergences[name] * num_ranks for name in rows],
    )


def _on_device(
    weighed: WeighedMicroBatch,
    coefficients: _Coefficients,
    reference: ReferenceModel | None,
    device: torch.device,
) -> ModelTensors:
    """The micro-batch on the device; `reference` is given on all ranks or on none, wherever its
    rows are.
    """
    if reference is None:
        return to_device(weighed.micro_batch, coefficients.nll_S, device, weighed.weights_P)
    return to_device_with_reference(
        weighed.micro_batch,
        weighed.reference_rows_U,
        reference,
        coefficients_S=coefficients.nll_S,
        divergences_S=coefficients.divergence_S,
        device=device,
        weights_P=weighed.weights_P,
    )


class Stopwatch:
    """Adds up the seconds of named parts.

    On a GPU it marks the stream and reads the marks only in `seconds`, so that nothing waits.
    """

    def __init__(self, device: torch.device) -> None:
        self._on_gpu = device.type == "cuda"
        self._marks: list[tuple[str, torch.cuda.Event | float]] = []
        self.mark("begin")

    def mark(self, part: str) -> None:
        """What happened since the last mark belongs to `part`."""
        if not self._on_gpu:
            self._marks.append((part, time.perf_counter()))
            return
        event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        event.record()
        self._marks.append((part, event))

    def seconds(self) -> dict[str, float]:
        """Seconds of each part; on a GPU this waits for the last mark."""
        sums: dict[str, float] = {}
        previous = self._marks[0][1]
        for part, mark in self._marks[1:]:
            sums[part] = sums.get(part, 0.0) + _between(previous, mark)
            previous = mark
        return sums


def _between(earlier: "torch.cuda.Event | float", later: "torch.cuda.Event | float") -> float:
    if isinstance(earlier, float) and isinstance(later, float):
        return later - earlier
    assert isinstance(earlier, torch.cuda.Event) and isinstance(later, torch.cuda.Event)
    later.synchronize()
    return float(earlier.elapsed_time(later)) / 1000
