"""A step's batch goes in, the weights have moved when its result comes out; sums and counts travel apart, one division."""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from bigmix.dist import Cluster
from bigmix.engine import Engine
from bigmix.loss.terms import LossTokens, Statistic
from bigmix.model import ModelTensors
from bigmix.objective import Objective, StepShares, StepWeights, weigh
from bigmix.records import Ints, MicroBatch, StepBatch


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
) -> StepResult:
    """One optimizer step; a collective, with one sum of counts before the first forward.

    `chance` decides the dropout of this step on this rank, so that a resumed run drops what an uninterrupted one
    does. Every rank learns whether any of them was asked to stop.
    """
    torch.manual_seed(chance)
    watch = Stopwatch(engine.device)
    names = tuple(batch.rows)
    counts = cluster.sum_counts(
        [*batch.loss_tokens.values(), *batch.tokens.values(), batch.squares, float(stop_asked)]
    )
    loss_tokens = {name: int(count) for name, count in zip(names, counts, strict=False)}
    tokens = {name: int(n) for name, n in zip(names, counts[len(names) :], strict=False)}
    weights = weigh(objective, shares, batch.rows, loss_tokens)
    # ZeRO averages gradients over ranks; times the number of ranks, the mean is the step's sum again.
    coefficients_S = [weight * cluster.world.size for weight in weights.token.values()]
    sums_SM = torch.zeros(len(names), len(Statistic), device=engine.device)
    for micro_batch in batch.micro_batches:
        watch.mark("other")
        value, micro_SM = engine.forward(tensors(micro_batch, coefficients_S, engine.device))
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


def tensors(
    micro_batch: MicroBatch, coefficients_G: Sequence[float], device: torch.device
) -> ModelTensors:
    """A micro-batch on the device, each loss token with the coefficient of its group."""

    def move(array: Ints) -> Tensor:
        return torch.from_numpy(array).to(device, non_blocking=True).long()

    ids_BT, starts_P = move(micro_batch.ids_BT), move(micro_batch.starts_P)
    lengths_P = torch.diff(starts_P, append=starts_P.new_full((1,), ids_BT.numel()))
    positions_X, part_X = _runs(torch.zeros_like(starts_P), lengths_P, ids_BT.numel())
    num_kept = int(micro_batch.lengths_K.sum())
    kept_N, _ = _runs(move(micro_batch.begins_K), move(micro_batch.lengths_K), num_kept)
    groups_N = move(micro_batch.groups_P)[part_X[kept_N]]
    table_G = torch.tensor(coefficients_G, dtype=torch.float32, device=device)
    return ModelTensors(
        ids_BT=ids_BT,
        positions_BT=positions_X.view_as(ids_BT),
        tokens=LossTokens(
            positions_N=kept_N,
            labels_N=ids_BT.flatten()[kept_N + 1],
            groups_N=groups_N,
            coefficients_N=table_G[groups_N],
            num_groups=len(coefficients_G),
        ),
    )


def _runs(begins_K: Tensor, lengths_K: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Runs of numbers laid end to end, begins_K[k], begins_K[k] + 1, ..., `count` in all, and the run of each."""
    # With the size given, the device is not waited for.
    run_X = torch.repeat_interleave(lengths_K, output_size=count)
    shifts_K = begins_K - lengths_K.cumsum(0) + lengths_K
    return torch.arange(count, device=begins_K.device) + shifts_K[run_X], run_X


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
