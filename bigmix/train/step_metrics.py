"""Results of steps and evaluations go in, the lines of metrics.jsonl come out, with what a run has
added up so far.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from bigmix.evaluation.held_out import Base
from bigmix.loss.terms import Statistic
from bigmix.model.flops import Cost
from bigmix.runs.metrics_log import Line
from bigmix.train.step import StepResult


@dataclass(frozen=True, kw_only=True, slots=True)
class Timed:
    """A step's result with what the loop measured around it, in seconds."""

    result: StepResult
    data_wait_s: float
    save_wait_s: float
    step_s: float
    peak_gib: float


class Report:
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
        self._waiting: list[Timed] = []
        self._totals: dict[str, dict[str, float]] = {
            unit: dict.fromkeys(self._sources, 0)
            for unit in ("rows", "tokens", "loss_tokens", "gradient")
        }
        self._substituted = dict.fromkeys(self._sources, 0)
        self.base = Base()
        self._interval = dict.fromkeys(self._sources, (0.0, 0))
        self._skipped = 0

    def add(self, timed: Timed) -> None:
        """Take a step in; its numbers are not read yet."""
        self._waiting.append(timed)

    def read(self) -> list[Line]:
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

    def passed_over(self, step: int) -> Line:
        """The line of a step that is not trained; every step before it must have been read."""
        assert not self._waiting, "read the report before a step is passed over"
        return {"step": step, "passed_over": True, "skipped": self._skipped} | self._sums(step)

    def follow(self, epochs: Callable[[int], Mapping[str, float]]) -> None:
        """From here on `epochs` says how far each source is after a step."""
        self._epochs = epochs

    def begin_interval(self) -> None:
        """Begin to add losses up anew for `interval_losses`."""
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
        return {
            "totals": totals,
            "substituted": dict(self._substituted),
            "base": dict(self.base.losses),
            "interval": dict(self._interval),
            "skipped": self._skipped,
        }

    def resume(self, state: Mapping[str, Any]) -> None:
        """Go on from what `state` gave; a source that has joined since then begins at 0, one that
        is gone is left out.
        """
        self._totals = {
            unit: {name: values.get(name, 0) for name in self._sources}
            for unit, values in state["totals"].items()
        }
        self._substituted = {name: state["substituted"].get(name, 0) for name in self._sources}
        self.base.resume(state["base"])
        # Releases without controllers kept none.
        interval = state.get("interval", {})
        self._interval = {name: tuple(interval.get(name, (0.0, 0))) for name in self._sources}
        self._skipped = int(state["skipped"])

    def _line(self, timed: Timed, sums: Mapping[str, Sequence[float]], norm: float) -> Line:
        result = timed.result
        # What was skipped has not been learned, and is not counted as if it had.
        self._skipped += result.skipped
        if not result.skipped:
            self._add(result, sums)
        parts = result.stopwatch.seconds()
        tokens = sum(result.tokens.values())
        line: Line = {
            "step": result.step,
            "loss": sum(
                result.weights.gradient[n] * sums[n][Statistic.NLL] / max(1, result.loss_tokens[n])
                for n in self._sources
            ),
            "lr": result.lr,
            "grad_norm": norm,
            "step_s": timed.step_s,
            "data_wait_s": timed.data_wait_s,
            "save_wait_s": timed.save_wait_s,
            "forward_s": parts.get("forward", 0.0),
            "backward_s": parts.get("backward", 0.0),
            "optimizer_s": parts.get("optimizer", 0.0),
            "tokens_per_s": tokens / timed.step_s,
            "mfu": self._mfu(result, timed.step_s),
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

    def _sums(self, step: int) -> Line:
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

    def _running(self) -> Line:
        """Totals and realised shares since the first step."""
        line: Line = {}
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
        needed = self._cost.of_step(tokens, loss_tokens, result.squares)
        return needed / step_s / self._peak_flops
