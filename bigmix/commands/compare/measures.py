"""What an evaluation measures, by name: its keys in metrics.jsonl, its words and digits, and which
way is better.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

Better = Literal["lower", "higher"]
LOSS, FORGETTING, GAIN = "held_out_loss", "forgetting", "gain"
# 97.5 % quantiles of Student's t for 1, 2, ... degrees of freedom; further ones are within 2 % of
# the last.
_T_975 = (
    12.71,
    4.303,
    3.182,
    2.776,
    2.571,
    2.447,
    2.365,
    2.306,
    2.262,
    2.228,
    2.201,
    2.179,
    2.160,
    2.145,
    2.131,
)


@dataclass(frozen=True, kw_only=True, slots=True)
class MeasuredValue:
    """A value and the ends of its 95 % interval, where that is known."""

    value: float
    low: float | None = None
    high: float | None = None

    @property
    def interval(self) -> tuple[float, float] | None:
        """Both ends, or None."""
        return None if self.low is None or self.high is None else (self.low, self.high)


@dataclass(frozen=True, kw_only=True, slots=True)
class Spread:
    """A value over the seeds of a point: the mean, the standard deviation, and a 95 % interval.

    The interval is Student's, of the mean over seeds; of a single run it is the run's own bootstrap
    interval, and there is no standard deviation.
    """

    mean: float
    deviation: float | None
    low: float | None
    high: float | None
    values: Sequence[float]

    @property
    def interval(self) -> tuple[float, float] | None:
        """Both ends, or None."""
        return None if self.low is None or self.high is None else (self.low, self.high)


@dataclass(frozen=True, kw_only=True, slots=True)
class Measure:
    """How one measure is named, shown and judged."""

    key: str
    label: str
    better: Better
    is_signed: bool = False


SOURCE_MEASURES = (
    Measure(key=LOSS, label="held-out loss", better="lower"),
    Measure(key=FORGETTING, label="forgetting", better="lower", is_signed=True),
    Measure(key=GAIN, label="task gain", better="higher", is_signed=True),
    Measure(key="bits_per_byte", label="bits/byte", better="lower"),
    Measure(key="perplexity", label="perplexity", better="lower"),
    Measure(key="token_accuracy", label="token accuracy", better="higher"),
    Measure(key="last_word_accuracy", label="last-word accuracy", better="higher"),
    Measure(key="kl_to_base", label="KL to the base", better="lower"),
)
_READ = tuple(m.key for m in SOURCE_MEASURES if m.key not in (FORGETTING, GAIN))


def spread_of(estimates: Sequence[MeasuredValue]) -> Spread:
    """The same measure of one or more runs that differ in their seed alone."""
    values = [estimate.value for estimate in estimates]
    if len(values) == 1:
        only = estimates[0]
        return Spread(mean=only.value, deviation=None, low=only.low, high=only.high, values=values)
    mean, deviation = float(np.mean(values)), float(np.std(values, ddof=1))
    half = _T_975[min(len(values) - 1, len(_T_975)) - 1] * deviation / math.sqrt(len(values))
    return Spread(mean=mean, deviation=deviation, low=mean - half, high=mean + half, values=values)


def sources_of(line: Mapping[str, Any]) -> dict[str, dict[str, MeasuredValue]]:
    """The measures of each source in a line of an evaluation, by source and measure."""
    prefix = f"{LOSS}/"
    names = [key.removeprefix(prefix) for key in line if key.startswith(prefix)]
    return {name: _of_source(line, name) for name in names if line[prefix + name] is not None}


def diverged_in(line: Mapping[str, Any]) -> list[str]:
    """The sources that were evaluated and have no finite loss, which metrics.jsonl says as null."""
    prefix = f"{LOSS}/"
    return [
        key.removeprefix(prefix)
        for key, value in line.items()
        if key.startswith(prefix) and value is None
    ]


def sizes_of(line: Mapping[str, Any]) -> dict[str, str]:
    """How much each source was evaluated on, in words; of an older log nothing."""
    prefix = "held_out_documents/"
    return {
        (
            name := key.removeprefix(prefix)
        ): f"{value:,} documents, {line[f'held_out_tokens/{name}']:,} loss tokens"
        for key, value in line.items()
        if key.startswith(prefix)
    }


def _of_source(line: Mapping[str, Any], name: str) -> dict[str, MeasuredValue]:
    found = {}
    for key in _READ:
        stem = "held_out" if key == LOSS else key
        if (value := line.get(f"{key}/{name}")) is not None:
            low, high = line.get(f"{stem}_low/{name}"), line.get(f"{stem}_high/{name}")
            found[key] = MeasuredValue(value=value, low=low, high=high)
    if "perplexity" not in found:
        found["perplexity"] = _perplexity(found[LOSS])
    return found


def _perplexity(loss: MeasuredValue) -> MeasuredValue:
    ends = loss.interval or (None, None)
    low, high = (None if end is None else _exp(end) for end in ends)
    return MeasuredValue(value=_exp(loss.value), low=low, high=high)


def _exp(loss: float) -> float:
    """exp(loss); infinite where that is beyond a float."""
    return math.exp(loss) if loss < 700 else math.inf


def forgotten(line: Mapping[str, Any], name: str, *, before: float) -> dict[str, MeasuredValue]:
    """What a source lost since the loss `before`, and the same as a gain."""
    lost = line[f"{LOSS}/{name}"] - before
    low, high = line.get(f"forgetting_low/{name}"), line.get(f"forgetting_high/{name}")
    return {
        FORGETTING: MeasuredValue(value=lost, low=low, high=high),
        # 0.0 - 0.0 is 0.0, where -0.0 would print a sign.
        GAIN: MeasuredValue(
            value=0.0 - lost,
            low=None if high is None else 0.0 - high,
            high=None if low is None else 0.0 - low,
        ),
    }


def tasks_of(line: Mapping[str, Any]) -> dict[str, dict[str, MeasuredValue]]:
    """The scores of each task in a line of an evaluation, by task and score; all are fractions,
    higher is better.
    """
    found: dict[str, dict[str, MeasuredValue]] = {}
    for key, value in line.items():
        prefix, _, rest = key.partition("/")
        if prefix == "task" and value is not None:
            name, _, score = rest.rpartition("/")
            low, high = line.get(f"task_low/{rest}"), line.get(f"task_high/{rest}")
            found.setdefault(name, {})[score] = MeasuredValue(value=value, low=low, high=high)
    return found


def examples_of(line: Mapping[str, Any]) -> dict[str, int]:
    """How many examples each task was scored on."""
    prefix = "task_examples/"
    return {
        key.removeprefix(prefix): int(value)
        for key, value in line.items()
        if key.startswith(prefix)
    }


def score_measure(score: str) -> Measure:
    """How a score of a task is shown."""
    return Measure(key=score, label=score.replace("_", " "), better="higher")
