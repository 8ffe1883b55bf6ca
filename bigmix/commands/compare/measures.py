"""What an evaluation measures: how each measure is named, read from metrics.jsonl and judged."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, Literal

import numpy as np

from bigmix.evaluation.bootstrap import Estimate

Better = Literal["lower", "higher"]
LOSS, FORGETTING, GAIN = "held_out_loss", "forgetting", "gain"
BEHAVIOUR: Final = "behaviour"  # where a held-out source could stand; no source has this name
INSTRUCTIONS, SENTENCES = "instructions", "sentences"
# 97.5 % quantiles of Student's t for 1, 2, ... degrees of freedom. For more of them the last one is
# taken, which is at most 9 % too large.
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
class Measure:
    """How a measure is named and shown, and which way is better; `better` is None where neither
    is. `has_interval`: whether tables show the interval of a single run.
    """

    key: str
    label: str
    better: Better | None
    is_signed: bool = False
    digits: int = 3
    has_interval: bool = True


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
_LOGGED = tuple(m.key for m in SOURCE_MEASURES if m.key not in (FORGETTING, GAIN))
BEHAVIOUR_MEASURES = (
    Measure(key=FORGETTING, label="forgetting", better="lower", is_signed=True),
    Measure(key="kl", label="KL", better="lower"),
    Measure(key=INSTRUCTIONS, label="instructions", better="higher", digits=2),
    Measure(key=SENTENCES, label="sentences", better="higher", digits=2),
    Measure(key="stops", label="stops", better="higher", digits=2, has_interval=False),
    Measure(key="length", label="length", better=None, digits=1, has_interval=False),
    Measure(key="same", label="same", better="higher", digits=2, has_interval=False),
)


def score_measure(score: str) -> Measure:
    """How a score of a task is shown."""
    return Measure(key=score, label=score.replace("_", " "), better="higher")


@dataclass(frozen=True, kw_only=True, slots=True)
class Spread:
    """A value over the seeds of a point: the mean with a 95 % interval, and the standard deviation.

    The interval is Student's, of the mean over seeds. A single run has no standard deviation, and
    the interval is its own bootstrap interval. `reach` is from the lowest to the highest end of
    the runs' own intervals, where a run without one counts with its value: what holds for the
    whole reach holds for every seed.
    """

    estimate: Estimate
    deviation: float | None
    values: Sequence[float]
    reach: tuple[float, float]

    @property
    def mean(self) -> float:
        """The mean over seeds."""
        return self.estimate.value

    @property
    def interval(self) -> tuple[float, float] | None:
        """Both ends of the interval; None where one of them is not known."""
        return self.estimate.interval


def spread_of(estimates: Sequence[Estimate]) -> Spread:
    """The same measure of one or more runs that differ in their seed alone."""
    values = [estimate.value for estimate in estimates]
    ends = [end for estimate in estimates for end in estimate.interval or (estimate.value,)]
    reach = (min(ends), max(ends))
    if len(values) == 1:
        return Spread(estimate=estimates[0], deviation=None, values=values, reach=reach)
    mean, deviation = float(np.mean(values)), float(np.std(values, ddof=1))
    half = _T_975[min(len(values) - 1, len(_T_975)) - 1] * deviation / math.sqrt(len(values))
    over_seeds = Estimate(value=mean, low=mean - half, high=mean + half)
    return Spread(estimate=over_seeds, deviation=deviation, values=values, reach=reach)


def spread_of_known(found: Sequence[Estimate | None]) -> Spread | None:
    """The same; None where a run lacks the measure."""
    known = [estimate for estimate in found if estimate is not None]
    return spread_of(known) if known and len(known) == len(found) else None


def drop(before: Estimate, after: Estimate) -> Estimate:
    """How much lower a fraction is than before.

    The interval is that of a difference of independent fractions (Newcombe, 1998). It is wider than
    that of paired ones, as those of the same prompts or examples are.
    """
    value = before.value - after.value
    low = math.hypot(before.value - before.low, after.high - after.value)
    high = math.hypot(before.high - before.value, after.value - after.low)
    return Estimate(value=value, low=value - low, high=value + high)


@dataclass(frozen=True, kw_only=True, slots=True)
class Evaluation:
    """The evaluation of a model after `step` steps and `task_tokens` tokens of task sources, which
    are None where they are not known.

    `sources` has the measures of each held-out source by their keys, `tasks` the scores of each
    task, `num_examples` how many examples a task was scored on. `behaviour` has the measures of the
    behaviour probe, empty where it was not part of the evaluation. `diverged` are the sources whose
    loss is not finite. `sizes` says on how much data each source, and `behaviour`, was evaluated,
    to be shown. `chats` has the sources of which the log says that they have conversations (True)
    or texts (False).
    """

    step: int
    task_tokens: int | None
    sources: Mapping[str, Mapping[str, Estimate]]
    tasks: Mapping[str, Mapping[str, Estimate]]
    num_examples: Mapping[str, int]
    behaviour: Mapping[str, Estimate] = field(default_factory=dict)
    diverged: Sequence[str] = ()
    sizes: Mapping[str, str] = field(default_factory=dict)
    chats: Mapping[str, bool] = field(default_factory=dict)


def evaluations_in(
    lines: Sequence[Mapping[str, Any]], tasks: Sequence[str], known_tokens: int | None = None
) -> list[Evaluation]:
    """Every evaluation in the lines of a log, by step; of two at one step the later one counts.

    `tasks` are the task sources, whose tokens are counted; `known_tokens` is that count for a model
    whose training is not in the lines.
    """
    task_tokens = {0: 0}
    for line in lines:
        if not line.get("eval"):
            task_tokens[line["step"]] = sum(line.get(f"total_tokens/{task}") or 0 for task in tasks)
    logged_steps = sorted(task_tokens)
    evaluated = {line["step"]: line for line in lines if line.get("eval") and _has_results(line)}
    first = _sources_in(evaluated[min(evaluated)]) if evaluated else {}
    found = []
    for step in sorted(evaluated):
        line = evaluated[step]
        logged_at = max(logged for logged in logged_steps if logged <= step)
        is_logged = step == 0 or len(logged_steps) > 1
        sources = {
            name: measures
            | (_forgetting_in(line, name, before=first[name][LOSS].value) if name in first else {})
            for name, measures in _sources_in(line).items()
        }
        found.append(
            Evaluation(
                step=step,
                task_tokens=task_tokens[logged_at] if is_logged else known_tokens,
                sources=sources,
                tasks=_tasks_in(line),
                num_examples=_examples_in(line),
                behaviour=_behaviour_in(line),
                chats=_chats_in(line),
                diverged=_diverged_in(line),
                sizes=_sizes_in(line),
            )
        )
    return found


def _has_results(line: Mapping[str, Any]) -> bool:
    return bool(_sources_in(line) or _tasks_in(line) or _behaviour_in(line) or _diverged_in(line))


def _sources_in(line: Mapping[str, Any]) -> dict[str, dict[str, Estimate]]:
    """The measures of each source in a line of an evaluation, by source and measure."""
    prefix = f"{LOSS}/"
    names = [key.removeprefix(prefix) for key in line if key.startswith(prefix)]
    return {name: _measures_in(line, name) for name in names if line[prefix + name] is not None}


def _diverged_in(line: Mapping[str, Any]) -> list[str]:
    """The sources that were evaluated and whose loss is not finite; it is null in metrics.jsonl."""
    prefix = f"{LOSS}/"
    return [
        key.removeprefix(prefix)
        for key, value in line.items()
        if key.startswith(prefix) and value is None
    ]


def _chats_in(line: Mapping[str, Any]) -> dict[str, bool]:
    prefix = "held_out_chat/"
    return {key.removeprefix(prefix): v for key, v in line.items() if key.startswith(prefix)}


def _sizes_in(line: Mapping[str, Any]) -> dict[str, str]:
    """On how much data each source was evaluated, as a text; empty for the log of an earlier
    version.
    """
    prefix = "held_out_documents/"
    prompts, constrained = (line.get(f"behaviour_{kind}") for kind in ("prompts", "constrained"))
    probe = f"{prompts or 0:,} prompts, {constrained or 0:,} with constraints"
    return ({BEHAVIOUR: probe} if prompts else {}) | {
        (
            name := key.removeprefix(prefix)
        ): f"{value:,} documents, {line[f'held_out_tokens/{name}']:,} loss tokens"
        for key, value in line.items()
        if key.startswith(prefix)
    }


def _measures_in(line: Mapping[str, Any], name: str) -> dict[str, Estimate]:
    found = {}
    for key in _LOGGED:
        stem = "held_out" if key == LOSS else key
        if (value := line.get(f"{key}/{name}")) is not None:
            found[key] = _estimate(line, value, stem, name)
    if "perplexity" not in found:
        found["perplexity"] = _perplexity(found[LOSS])
    return found


def _perplexity(loss: Estimate) -> Estimate:
    low, high = loss.interval or (math.nan, math.nan)
    return Estimate(value=_exp(loss.value), low=_exp(low), high=_exp(high))


def _exp(loss: float) -> float:
    """exp(loss); infinite where that is beyond a float."""
    return math.inf if loss >= 700 else math.exp(loss)


def _estimate(line: Mapping[str, Any], value: float, stem: str, name: str) -> Estimate:
    """A value with the ends of its interval, whose keys begin with `stem`, where they are known."""
    low, high = (line.get(f"{stem}_{end}/{name}") for end in ("low", "high"))
    return Estimate(
        value=value,
        low=math.nan if low is None else low,
        high=math.nan if high is None else high,
    )


def _forgetting_in(line: Mapping[str, Any], name: str, *, before: float) -> dict[str, Estimate]:
    """What was forgotten of a source since its loss was `before`, and the same as a gain."""
    lost = _estimate(line, line[f"{LOSS}/{name}"] - before, FORGETTING, name)
    # 0.0 - 0.0 is 0.0, where -0.0 would print a sign.
    gain = Estimate(value=0.0 - lost.value, low=0.0 - lost.high, high=0.0 - lost.low)
    return {FORGETTING: lost, GAIN: gain}


def _tasks_in(line: Mapping[str, Any]) -> dict[str, dict[str, Estimate]]:
    """The scores of each task in a line of an evaluation, by task and score; all are from 0 to 1,
    and higher is better.
    """
    found: dict[str, dict[str, Estimate]] = {}
    for key, value in line.items():
        prefix, _, rest = key.partition("/")
        if prefix == "task" and value is not None:
            name, _, score = rest.rpartition("/")
            found.setdefault(name, {})[score] = _estimate(line, value, "task", rest)
    return found


def _behaviour_in(line: Mapping[str, Any]) -> dict[str, Estimate]:
    """The measures of the behaviour probe in a line of an evaluation."""
    found = {}
    for measure in BEHAVIOUR_MEASURES:
        if (value := line.get(f"{BEHAVIOUR}/{measure.key}")) is not None:
            found[measure.key] = _estimate(line, value, BEHAVIOUR, measure.key)
    return found


def _examples_in(line: Mapping[str, Any]) -> dict[str, int]:
    """How many examples each task was scored on."""
    prefix = "task_examples/"
    return {
        key.removeprefix(prefix): int(value)
        for key, value in line.items()
        if key.startswith(prefix)
    }
