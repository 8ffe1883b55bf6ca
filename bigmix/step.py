"""A step's batch goes in, the weights have moved when its result comes out; sums and counts travel apart, one division."""

import time
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from bigmix.dist import Cluster
from bigmix.engine import Engine
from bigmix.loss.terms import Statistic
from bigmix.objective import Objective, StepShares, StepWeights, divergence_weights, weigh
from bigmix.on_device import tensors
from bigmix.records import Ints, MicroBatch, StepBatch
from bigmix.reference import Anchor, rows_of_sources, tensors_with_reference


@dataclass(frozen=True, kw_only=True, slots=True)
class StepResult:
    """What a step did, over all ranks. `sums_SM` (see `GroupSums`), `gradient_norm` and `stopwatch` are on the device until they are read."""

    step: int
    lr: float
    rows: Mapping[str, int]
    tokens: Mapping[str, int]
    loss_tokens: Mapping[str, int]
    squares: int
    weights: StepWeights
    sums_SM: Tensor
    gradient_norm: Tensor | float
    stopwatch: "Stopwatch"
    skipped: bool
    stop_asked: bool


def run(
    engine: Engine,
    cluster: Cluster,
    batch: StepBatch,
    *,
    shares: StepShares,
    objective: Objective,
    lr: float,
    chance: int,
    stop_asked: bool,
    anchor: Anchor | None = None,
) -> StepResult:
    """One optimizer step; a collective, with one sum of counts before the first forward.

    `chance` decides the dropout of this step on this rank, so that a resumed run drops what an uninterrupted one
    does. Every rank learns whether any of them was asked to stop.
    """
    torch.manual_seed(chance)
    watch = Stopwatch(engine.device)
    names = tuple(batch.rows)
    anchored = [_anchored_rows(part, names, anchor) for part in batch.micro_batches]
    own = [*batch.loss_tokens.values(), *batch.tokens.values(), *map(len, anchored)]
    counts = cluster.sum_counts([*own, batch.squares, float(stop_asked)])
    loss_tokens, tokens = (
        {name: int(n) for name, n in zip(names, counts[begin:], strict=False)}
        for begin in (0, len(names))
    )
    weights = weigh(objective, shares, batch.rows, loss_tokens)
    # ZeRO averages gradients over ranks; times the number of ranks, the mean is the step's sum again.
    coefficients_S = [weight * cluster.world.size for weight in weights.token.values()]
    divergences = divergence_weights(
        anchor.weights if anchor else {}, shares, batch.rows, loss_tokens
    )
    divergences_S = [divergences[name] * cluster.world.size for name in names]
    sums_SM = torch.zeros(len(names), len(Statistic), device=engine.device)
    for index, (part, rows_U) in enumerate(zip(batch.micro_batches, anchored, strict=True)):
        watch.mark("other")
        # All ranks show it to the frozen model or none does.
        if anchor is not None and counts[2 * len(names) + index]:
            moved = tensors_with_reference(
                part,
                rows_U,
                anchor,
                coefficients_S=coefficients_S,
                divergences_S=divergences_S,
                device=engine.device,
            )
        else:
            moved = tensors(part, coefficients_S, engine.device)
        value, micro_SM = engine.forward(moved)
        sums_SM += micro_SM
        watch.mark("forward")
        engine.backward(value)
        watch.mark("backward")
        engine.step_micro_batch(lr)
        watch.mark("optimizer")
    return StepResult(
        step=batch.step,
        lr=lr,
        rows=batch.rows,
        tokens=tokens,
        loss_tokens=loss_tokens,
        squares=int(counts[-2]),
        weights=weights,
        sums_SM=cluster.sum_tensor(sums_SM),
        gradient_norm=engine.gradient_norm(),
        stopwatch=watch,
        skipped=engine.was_skipped(),
        stop_asked=counts[-1] > 0,
    )


def _anchored_rows(part: MicroBatch, names: tuple[str, ...], anchor: Anchor | None) -> Ints:
    chosen_S = [anchor is not None and name in anchor.weights for name in names]
    return rows_of_sources(part, chosen_S)


class Stopwatch:
    """Adds up the seconds of named parts. On a GPU it marks the stream and reads the marks when asked: no waiting."""

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
