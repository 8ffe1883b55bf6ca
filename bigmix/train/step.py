"""A step's batch goes in, the weights have moved when its result comes out; sums and counts travel
apart, one division.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from bigmix.cluster.collectives import Cluster
from bigmix.data.batch import EXPONENTS, masses, part_weights
from bigmix.data.records import MicroBatch, StepBatch
from bigmix.loss.objective import Objective, StepShares, StepWeights, divergence_weights, weigh
from bigmix.loss.terms import Statistic
from bigmix.model.causal_lm import ModelTensors
from bigmix.model.engine import Engine
from bigmix.model.inputs import Anchor, rows_of_sources, tensors, tensors_with_reference
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
    squares: int
    weights: StepWeights
    sums_SM: Tensor
    gradient_norm: Tensor | float
    finite_M: Tensor
    stopwatch: "Stopwatch"
    skipped: bool


@dataclass(frozen=True, kw_only=True, slots=True)
class Aim:
    """What steps minimise: the objective, how the tokens of each source weigh among themselves,
    what it stays near to.
    """

    objective: Objective
    weighing: Mapping[str, Weighing]
    anchor: Anchor | None


@dataclass(frozen=True, kw_only=True, slots=True)
class _Coefficients:
    """What a loss token of each source is multiplied by in the objective."""

    nll_S: Sequence[float]
    divergence_S: Sequence[float]


@dataclass(frozen=True, kw_only=True, slots=True)
class _Part:
    """A micro-batch with the weights of its parts, None where all weigh alike, and the rows that
    the frozen model is shown.
    """

    micro_batch: MicroBatch
    weights_P: Floats | None
    anchored_U: Ints


@dataclass(frozen=True, kw_only=True, slots=True)
class _Counts:
    """A step's counts over all ranks; `anchored_rows`: in each micro-batch those that the frozen
    model is shown.
    """

    loss_tokens: Mapping[str, int]
    tokens: Mapping[str, int]
    masses: Mapping[str, float]
    anchored_rows: Sequence[int]
    squares: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Outline:
    """What the ranks know of a step without its batch: the sources, and the micro-batches of each
    rank.
    """

    names: Sequence[str]
    micro_batches: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Ready:
    """A step that every rank has its batch of: this rank's one, its parts, and the counts over all
    ranks.
    """

    batch: StepBatch
    parts: Sequence[_Part]
    counts: _Counts


@dataclass(frozen=True, kw_only=True, slots=True)
class Agreement:
    """What all ranks know before a step: whether any was asked to stop; `ready` is None where any
    has no batch.
    """

    stop_asked: bool
    ready: Ready | None


def agree(
    cluster: Cluster, batch: StepBatch | None, outline: Outline, aim: Aim, *, stop_asked: bool
) -> Agreement:
    """What the ranks have for the next step, and whether to go on; a collective, the one sum before
    the first forward.

    A rank without a batch takes part all the same: then the step is trained by none. Every rank
    learns whether any of them was asked to stop.
    """
    names = tuple(outline.names)
    parts = [] if batch is None else [_part(m, names, aim) for m in batch.micro_batches]
    own = [0.0] * _numbers(outline) if batch is None else _own_counts(batch, parts, names)
    stops, absent, *sums = cluster.sum_counts([stop_asked, batch is None, *own])
    return Agreement(
        stop_asked=stops > 0,
        ready=(
            None
            if batch is None or absent
            else Ready(batch=batch, parts=parts, counts=_counts(sums, names))
        ),
    )


def run(
    engine: Engine,
    cluster: Cluster,
    ready: Ready,
    *,
    shares: StepShares,
    aim: Aim,
    lr: float,
    chance: int,
    doing: Callable[[str], None],
) -> StepResult:
    """One optimizer step on what the ranks have agreed on; a collective.

    `chance` decides the dropout of this step on this rank, so that a resumed run drops what an
    uninterrupted one does. `doing` is told what begins.
    """
    torch.manual_seed(chance)
    watch = Stopwatch(engine.device)
    batch, counts = ready.batch, ready.counts
    weights = weigh(aim.objective, shares, batch.rows, counts.loss_tokens, counts.masses)
    coefficients = _coefficients(weights, counts, batch, shares, aim, cluster.world.size)
    place = f"of step {batch.step}, micro-batch"
    sums_SM = torch.zeros(len(batch.rows), len(Statistic), device=engine.device)
    finite: list[Tensor] = []
    for number, (part, shown) in enumerate(zip(ready.parts, counts.anchored_rows, strict=True), 1):
        watch.mark("other")
        doing(f"forward {place} {number}")
        value, micro_SM = engine.forward(
            _moved(part, coefficients, aim.anchor if shown else None, engine.device)
        )
        sums_SM += micro_SM
        finite.append(value.detach().isfinite())
        watch.mark("forward")
        doing(f"backward {place} {number}")
        engine.backward(value)
        watch.mark("backward")
        doing(f"optimizer {place} {number}")
        engine.step_micro_batch(lr)
        watch.mark("optimizer")
    skipped = engine.was_skipped()
    if not skipped:
        engine.update_average()
        watch.mark("optimizer")
    return StepResult(
        step=batch.step,
        lr=lr,
        rows=batch.rows,
        substituted=batch.substituted,
        tokens=counts.tokens,
        loss_tokens=counts.loss_tokens,
        squares=counts.squares,
        weights=weights,
        sums_SM=cluster.sum_tensor(sums_SM),
        gradient_norm=engine.gradient_norm(),
        finite_M=torch.stack(finite),
        stopwatch=watch,
        skipped=skipped,
    )


def _part(micro_batch: MicroBatch, names: Sequence[str], aim: Aim) -> _Part:
    exponents_S = [EXPONENTS[aim.weighing.get(name, "token")] for name in names]
    anchored = aim.anchor.weights if aim.anchor is not None else {}
    return _Part(
        micro_batch=micro_batch,
        weights_P=part_weights(micro_batch, exponents_S) if any(exponents_S) else None,
        anchored_U=rows_of_sources(micro_batch, [name in anchored for name in names]),
    )


def _numbers(outline: Outline) -> int:
    """How many numbers `_own_counts` gives."""
    return 1 + 3 * len(outline.names) + outline.micro_batches


def _own_counts(batch: StepBatch, parts: Sequence[_Part], names: Sequence[str]) -> Sequence[float]:
    """What this rank adds to the counts of the step, as `_counts` reads it."""
    weighed = [
        masses(part.micro_batch, part.weights_P, len(names))
        for part in parts
        if part.weights_P is not None
    ]
    loss_tokens = [batch.loss_tokens[name] for name in names]
    return [
        batch.squares,
        *loss_tokens,
        *(batch.tokens[name] for name in names),
        *(np.sum(weighed, axis=0) if weighed else loss_tokens),
        *(len(part.anchored_U) for part in parts),
    ]


def _counts(sums: Sequence[float], names: Sequence[str]) -> _Counts:
    squares, *rest = sums
    loss_tokens, tokens, mass = (
        dict(zip(names, rest[index * len(names) :], strict=False)) for index in range(3)
    )
    return _Counts(
        loss_tokens={name: int(count) for name, count in loss_tokens.items()},
        tokens={name: int(count) for name, count in tokens.items()},
        masses=mass,
        anchored_rows=[int(count) for count in rest[3 * len(names) :]],
        squares=int(squares),
    )


def _coefficients(
    weights: StepWeights,
    counts: _Counts,
    batch: StepBatch,
    shares: StepShares,
    aim: Aim,
    ranks: int,
) -> _Coefficients:
    kappas = aim.anchor.weights if aim.anchor is not None else {}
    divergences = divergence_weights(kappas, shares, batch.rows, counts.loss_tokens)
    names = tuple(batch.rows)
    # ZeRO averages gradients over ranks; times the number of ranks, the mean is the step's sum
    # again.
    return _Coefficients(
        nll_S=[weights.token[name] * ranks for name in names],
        divergence_S=[divergences[name] * ranks for name in names],
    )


def _moved(
    part: _Part, coefficients: _Coefficients, anchor: Anchor | None, device: torch.device
) -> ModelTensors:
    """The micro-batch on the device; `anchor` is given on all ranks or on none, wherever its rows
    are.
    """
    if anchor is None:
        return tensors(part.micro_batch, coefficients.nll_S, device, part.weights_P)
    return tensors_with_reference(
        part.micro_batch,
        part.anchored_U,
        anchor,
        coefficients_S=coefficients.nll_S,
        divergences_S=coefficients.divergence_S,
        device=device,
        weights_P=part.weights_P,
    )


class Stopwatch:
    """Adds up the seconds of named parts.

    On a GPU it marks the stream and reads the marks when asked: no waiting.
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
