"""Times, adds up and writes what the steps of a run measure, and watches its health."""

import math
import os
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from statistics import fmean, stdev
from typing import Any

import torch

from bigmix.cluster.signals import StopSignal
from bigmix.cluster.watchdog import Watchdog
from bigmix.evaluation.held_out import Baseline
from bigmix.loss.terms import Statistic
from bigmix.model.flops import Cost
from bigmix.recipe import Recipe
from bigmix.runs.metrics_log import MetricsRecord, RunLog
from bigmix.runs.resume import RollBack
from bigmix.runs.saver import Saver
from bigmix.terminal import Terminal
from bigmix.train.step import StepResult

WINDOW = 100  # losses that a new one is held against
_LEAPT = "the loss leapt up"
_FEWEST = 20  # of them, before which nothing is called a spike
_RECENT_STEPS = 10  # the longest of them must fit before the end of the time


@dataclass(frozen=True, kw_only=True, slots=True)
class StepTimes:
    """Seconds of a step: waiting for its rows, waiting for saves since the step before, and all of
    it.
    """

    data_wait_s: float
    save_wait_s: float
    step_s: float


class StepClock:
    """Measures steps, and asks for a stop while the longest of the last ones still fits into the
    time that is left.
    """

    def __init__(
        self,
        stop_signal: StopSignal,
        watchdog: Watchdog,
        saver: Saver,
        ends: Mapping[str, float | None],
    ) -> None:
        """`ends` are the arguments of `StopSignal.set_end`."""
        self._stop_signal, self._watchdog, self._saver, self._ends = (
            stop_signal,
            watchdog,
            saver,
            ends,
        )
        self._recent_s: deque[float] = deque(maxlen=_RECENT_STEPS)
        self._saves_counted_s = 0.0
        self._began = self._fetched = 0.0

    @contextmanager
    def loading(self, step: int) -> Iterator[None]:
        """A step begins: inside, its rows are waited for."""
        self._watchdog.doing(f"waiting for the rows of step {step}")
        self._began = time.perf_counter()
        yield
        self._fetched = time.perf_counter()
        self._watchdog.doing(f"agreement on step {step}")

    def must_stop(self) -> bool:
        """Whether a stop was requested, or the next step may not end in time."""
        return self._stop_signal.is_set(needed_s=max(self._recent_s, default=0.0))

    def lap(self) -> StepTimes:
        """A step ends: what it took."""
        ended = time.perf_counter()
        if not self._recent_s:
            # Only now: however little time there is, each start of a run trains at least a step.
            self._stop_signal.set_end(**self._ends)
        times = StepTimes(
            data_wait_s=self._fetched - self._began,
            save_wait_s=self._saver.wait_s - self._saves_counted_s,
            step_s=ended - self._began,
        )
        self._recent_s.append(times.step_s)
        self._saves_counted_s = self._saver.wait_s
        return times


def ends_of(recipe: Recipe) -> dict[str, float | None]:
    """When a run must stop by itself, as `StopSignal.set_end` takes it: `job_ends_at` in seconds
    since 1970, early enough for its Slurm job to end well.
    """
    end_time = os.environ.get("SLURM_JOB_END_TIME", "")
    early_s = 60 * recipe.checkpoint.stop_before_end_minutes
    job_ends_at = int(end_time) - early_s if end_time.isdigit() else None
    return {"max_minutes": recipe.checkpoint.max_minutes, "job_ends_at": job_ends_at}


@dataclass(frozen=True, kw_only=True, slots=True)
class Spike:
    """A step whose loss is `deviations` standard deviations above the mean of those before it."""

    step: int
    loss: float
    deviations: float


class Health:
    """Counts consecutive steps without a finite gradient, and detects spikes of the loss.

    `skips` in a row call for a roll-back, None: never. A loss more than `deviations` standard
    deviations above the mean of the last 100 is a spike, which is not added to them, None: none is;
    `spikes_roll_back`: each one asks for it.
    """

    def __init__(
        self, *, skips: int | None, deviations: float | None, spikes_roll_back: bool
    ) -> None:
        self._most_skips = skips
        self._deviations = deviations
        self._spikes_roll_back = spikes_roll_back
        self._back: RollBack | None = None
        self._skipped: list[int] = []
        self._losses: deque[float] = deque(maxlen=WINDOW)

    @property
    def is_well(self) -> bool:
        """Whether the last step moved the weights: only then they are worth a checkpoint."""
        return not self._skipped

    def take_rollback(self) -> RollBack | None:
        """The roll-back that is called for, if one is; it is given once."""
        back, self._back = self._back, None
        return back

    def observe(self, step: int, *, skipped: bool) -> None:
        """Take note of a step: whether it was skipped since its gradient was not finite."""
        if not skipped:
            self._skipped = []
            return
        self._skipped.append(step)
        if self._most_skips is not None and len(self._skipped) >= self._most_skips:
            steps, self._skipped = tuple(self._skipped), []
            reason = f"{len(steps)} steps in a row had no finite gradient"
            self._back = RollBack(steps=steps, reason=reason)

    def loss(self, step: int, loss: float) -> Spike | None:
        """Take the loss of a step in, in the order of the steps; the spike that it is."""
        if self._deviations is None or not math.isfinite(loss):
            return None
        height = _deviations(loss, self._losses) if len(self._losses) >= _FEWEST else 0.0
        if height <= self._deviations:
            self._losses.append(loss)
            return None
        if self._spikes_roll_back:
            before = self._back.steps if self._back is not None else ()
            self._back = RollBack(steps=(*before, step), reason=_LEAPT)
        return Spike(step=step, loss=loss, deviations=height)

    def state(self) -> list[float]:
        """The losses that the next one is held against."""
        return list(self._losses)

    def resume(self, state: Sequence[float]) -> None:
        """Go on from what `state` gave."""
        self._back, self._skipped = None, []
        self._losses = deque(state, maxlen=WINDOW)


def _deviations(loss: float, before: Sequence[float] | deque[float]) -> float:
    spread = stdev(before)
    above = loss - fmean(before)
    return above / spread if spread else math.inf * above if above > 0 else 0.0


@dataclass(frozen=True, kw_only=True, slots=True)
class TimedStep:
    """A step's result with what the loop measured around it."""

    result: StepResult
    times: StepTimes
    peak_gib: float


class MetricsAccumulator:
    """Keeps the results of steps until they are read, so that the device is waited for once in many
    steps.

    Totals run over the whole run, through resumes: `state` is what they are, `resume` puts it back,
    and so is what forgetting is measured from, `base`. `measured`: for each source what is written
    as KEY/SOURCE, a mean over its loss tokens in the step.
    """

    def __init__(
        self,
        sources: Sequence[str],
        epochs: Callable[[int], Mapping[str, float]],
        *,
        cost: Cost | None,
        peak_flops: float | None,
        measured: Mapping[str, Mapping[str, Statistic]],
    ) -> None:
        self._sources = tuple(sources)
        self._epochs = epochs
        self._cost = cost
        self._measured = dict(measured)
        self._peak_flops = peak_flops
        self._waiting: list[TimedStep] = []
        self._totals: dict[str, dict[str, float]] = {
            unit: dict.fromkeys(self._sources, 0)
            for unit in ("rows", "tokens", "loss_tokens", "gradient")
        }
        self._substituted = dict.fromkeys(self._sources, 0)
        self.base = Baseline()
        self._interval = dict.fromkeys(self._sources, (0.0, 0))
        self._skipped = 0

    def add(self, timed: TimedStep) -> None:
        """Take a step in; its numbers are not read yet."""
        self._waiting.append(timed)

    def read(self) -> list[MetricsRecord]:
        """The lines of the steps since the last call; waits for the device once."""
        if not self._waiting:
            return []
        sums = torch.stack([timed.result.sums_SM for timed in self._waiting]).tolist()
        norms = torch.stack(
            [torch.as_tensor(t.result.gradient_norm).float().cpu() for t in self._waiting]
        ).tolist()
        lines = [
            self._line(timed, dict(zip(self._sources, sums_SM, strict=True)), norm)
            for timed, sums_SM, norm in zip(self._waiting, sums, norms, strict=True)
        ]
        self._waiting = []
        return lines

    def skipped_step(self, step: int) -> MetricsRecord:
        """The line of a step that is not trained; every step before it must have been read."""
        assert not self._waiting, "read the metrics before a step is skipped"
        return {"step": step, "passed_over": True, "skipped": self._skipped} | self._sums(step)

    def follow(self, epochs: Callable[[int], Mapping[str, float]]) -> None:
        """From here on `epochs` says how far each source is after a step."""
        self._epochs = epochs

    def begin_interval(self) -> None:
        """Begin a new interval of `interval_losses`."""
        self._interval = dict.fromkeys(self._sources, (0.0, 0))

    def interval_losses(self) -> dict[str, float]:
        """The mean loss of each source since `begin_interval`, in nats per loss token, where one
        was trained.
        """
        return {name: nll / count for name, (nll, count) in self._interval.items() if count}

    def state(self) -> dict[str, Any]:
        """What has been added up until now, as plain values; every step must have been read."""
        assert not self._waiting, "read the report before its state"
        totals = {unit: dict(values) for unit, values in self._totals.items()}
        fingerprint = self.base.fingerprint
        return {
            "totals": totals,
            "substituted": dict(self._substituted),
            "base": dict(self.base.losses),
            "interval": dict(self._interval),
            "skipped": self._skipped,
        } | ({} if fingerprint is None else {"base_answers": fingerprint})

    def resume(self, state: Mapping[str, Any]) -> None:
        """Go on from what `state` gave; a source that has joined since then begins at 0, one that
        is gone is left out.
        """
        self._totals = {
            unit: {name: values.get(name, 0) for name in self._sources}
            for unit, values in state["totals"].items()
        }
        self._substituted = {name: state["substituted"].get(name, 0) for name in self._sources}
        self.base.resume(state["base"], state.get("base_answers"))
        # Releases without controllers kept none.
        interval = state.get("interval", {})
        self._interval = {name: tuple(interval.get(name, (0.0, 0))) for name in self._sources}
        self._skipped = int(state["skipped"])

    def _line(
        self, timed: TimedStep, sums: Mapping[str, Sequence[float]], norm: float
    ) -> MetricsRecord:
        result = timed.result
        # What was skipped has not been learned, and is not counted as if it had.
        self._skipped += result.skipped
        if not result.skipped:
            self._add(result, sums)
        parts = result.stopwatch.seconds()
        tokens = sum(result.tokens.values())
        line: MetricsRecord = {
            "step": result.step,
            "loss": sum(
                result.weights.gradient[n] * sums[n][Statistic.NLL] / max(1, result.loss_tokens[n])
                for n in self._sources
            ),
            "lr": result.lr,
            "grad_norm": norm,
            "step_s": timed.times.step_s,
            "data_wait_s": timed.times.data_wait_s,
            "save_wait_s": timed.times.save_wait_s,
            "forward_s": parts.get("forward", 0.0),
            "backward_s": parts.get("backward", 0.0),
            "optimizer_s": parts.get("optimizer", 0.0),
            "tokens_per_s": tokens / timed.times.step_s,
            "mfu": self._mfu(result, timed.times.step_s),
            "peak_gib": timed.peak_gib,
            "skipped": self._skipped,
        }
        for name in self._sources:
            count = result.loss_tokens[name]
            for key, statistic in self._measured[name].items():
                line[f"{key}/{name}"] = sums[name][statistic] / count if count else None
            line[f"rows/{name}"] = result.rows[name]
            line[f"tokens/{name}"] = result.tokens[name]
            line[f"loss_tokens/{name}"] = count
            if any(self._substituted.values()):
                line[f"substituted_rows/{name}"] = result.substituted[name]
        return line | self._sums(result.step)

    def _sums(self, step: int) -> MetricsRecord:
        line = self._running()
        line |= {f"epoch/{name}": value for name, value in self._epochs(step).items()}
        if any(self._substituted.values()):
            line |= {f"total_substituted_rows/{n}": count for n, count in self._substituted.items()}
        return line

    def _add(self, result: StepResult, sums: Mapping[str, Sequence[float]]) -> None:
        for name in self._sources:
            nll, count = self._interval[name]
            nll_sum = nll + sums[name][Statistic.NLL]
            self._interval[name] = (nll_sum, count + result.loss_tokens[name])
            self._totals["rows"][name] += result.rows[name]
            self._totals["tokens"][name] += result.tokens[name]
            self._totals["loss_tokens"][name] += result.loss_tokens[name]
            self._totals["gradient"][name] += result.weights.gradient[name]
            self._substituted[name] += result.substituted[name]

    def _running(self) -> MetricsRecord:
        """Totals and realised shares since the first step."""
        line: MetricsRecord = {}
        for unit, values in self._totals.items():
            total = sum(values.values())
            for name, value in values.items():
                share = value / total if total else None
                line[f"gradient_share/{name}" if unit == "gradient" else f"share_{unit}/{name}"] = (
                    share
                )
                if unit != "gradient":
                    line[f"total_{unit}/{name}"] = value
        return line

    def _mfu(self, result: StepResult, step_s: float) -> float | None:
        """The part of the devices' peak that the needed operations take (Chowdhery et al., "PaLM",
        2022).
        """
        if self._cost is None or self._peak_flops is None:
            return None
        tokens, loss_tokens = sum(result.tokens.values()), sum(result.loss_tokens.values())
        needed = self._cost.of_step(tokens, loss_tokens, result.sum_sq_lengths)
        return needed / step_s / self._peak_flops


class RunMetrics:
    """Writes what steps and evaluations measured: to metrics.jsonl and TensorBoard on the first
    rank, and to its terminal.
    """

    def __init__(
        self, report: MetricsAccumulator, log: RunLog | None, terminal: Terminal, health: Health
    ) -> None:
        """`log` is that of the first rank; `health` learns the loss of every step on all ranks."""
        self.report = report
        self._log, self._terminal, self._health = log, terminal, health

    def add(self, result: StepResult, times: StepTimes, peak_gib: float) -> None:
        """Take a step in; its numbers are not read yet, so that no device is waited for."""
        self.report.add(TimedStep(result=result, times=times, peak_gib=peak_gib))

    def flush(self, steps: int) -> None:
        """Read and write the steps that were added; `steps` are those of the run.

        All ranks learn of the same spikes.
        """
        lines = self.report.read()
        for line in lines:
            self.write(line)
            spike = self._health.loss(int(line["step"] or 0), float(line["loss"] or 0.0))
            if spike is not None:
                self._terminal.warning(
                    f"the loss of step {spike.step} is {spike.loss:.4g}, {spike.deviations:.1f}"
                    " standard deviations above those before it"
                )
        if lines:
            self._terminal.progress(int(lines[-1]["step"] or 0), steps, lines[-1])

    def skip(self, step: int, steps: int) -> None:
        """Record that a step is not trained; `steps` are those of the run."""
        self.flush(steps)
        self.write(self.report.skipped_step(step))
        self._terminal.note(f"step {step} is skipped as requested: its rows are not trained")

    def write(self, line: MetricsRecord) -> None:
        """Write one line."""
        if self._log is not None:
            self._log.write(line)

    def show_text(self, tag: str, text: str, step: int) -> None:
        """Show a text in Markdown in TensorBoard."""
        if self._log is not None:
            self._log.show_text(tag, text, step)

    def sync(self) -> None:
        """Put what is written on the disk."""
        if self._log is not None:
            self._log.flush()

    def go_back(self, step: int) -> None:
        """Take back what was written after a step, which is now the last one that is trained."""
        if self._log is not None:
            self._log.go_back(step)

    def close(self) -> None:
        """Write no more."""
        if self._log is not None:
            self._log.close()
