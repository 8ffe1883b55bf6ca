"""Warns of what makes runs hard to compare, and of behaviour that was not measured."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from bigmix.commands.compare.measures import BEHAVIOUR, LOSS
from bigmix.commands.compare.points import RunPoint
from bigmix.commands.compare.read import ABSENT, BASE, FinishedRun, ReadRun
from bigmix.evaluation.behaviour.inputs import has_chat_template
from bigmix.evaluation.bootstrap import Estimate

SAME_BASE = 1e-3  # relative difference of losses at step 0; kernels and numbers of GPUs make less
SAME_TOKENS = 0.02  # relative difference of task tokens; the last step is not cut to the token
_MAX_REASONS = 8  # why results were left out; how many were is reported in any case


def warnings_of(
    found: ReadRun, base: Mapping[str, Mapping[str, Estimate]], points: Sequence[RunPoint]
) -> Iterator[str]:
    if found.left_out:
        yield (
            f"{len(found.left_out)} results in the given folders are left out,"
            f" {len(found.runs)} are compared: "
            + "; ".join(found.left_out[:_MAX_REASONS])
            + (f"; and {more} more" if (more := len(found.left_out) - _MAX_REASONS) > 0 else "")
        )
    for run in found.runs:
        yield from _other_start(run, found.runs, base)
        for name in run.final.diverged:
            yield (
                f"{run.name} has no finite loss on `{name}` at step {run.final.step}; its cells are"
                " empty."
            )
        known = {*run.final.sources, *run.final.diverged}
        absent = [f"`{name}`" for name in base if name not in known]
        if absent:
            yield f"{run.name} was not evaluated on {', '.join(absent)}; its cells are empty."
    yield from _of_behaviour(found.runs)
    yield from _repeated(points)
    yield from _unequal_tokens(found.runs)


def _other_start(
    run: FinishedRun, runs: Sequence[FinishedRun], base: Mapping[str, Mapping[str, Estimate]]
) -> Iterator[str]:
    """A warning for each source on which a run is not comparable: it was evaluated on other data
    than the first run that was, or it began as another model.
    """
    for name, measures in run.first.sources.items():
        first = next(other for other in runs if name in other.first.sources)
        ours, theirs = (r.first.sizes.get(name) for r in (run, first))
        loss, of_base = measures[LOSS].value, base[name][LOSS].value
        if ours and theirs and ours != theirs:
            yield (
                f"{run.name} was evaluated on other held-out data of `{name}` than {first.name}:"
                f" {ours}, not {theirs}. Its numbers on that source are not comparable."
            )
        elif abs(loss - of_base) > SAME_BASE * abs(of_base):
            yield (
                f"{run.name} does not start from the {BASE} of the other runs: its loss on `{name}`"
                f" at step 0 is {loss:.4f}, not {of_base:.4f}. Its forgetting is measured from its"
                " own start; its other numbers are not comparable."
            )


def _repeated(points: Sequence[RunPoint]) -> Iterator[str]:
    """A warning for each point with the settings of an earlier one, whose seeds it repeats."""
    firsts: dict[tuple[tuple[str, str], ...], RunPoint] = {}
    for point in points:
        first = firsts.setdefault(tuple(point.settings.items()), point)
        if first is not point:
            yield (
                f"{point.name} has the recipe and a seed of {first.name}: it is a point of its own,"
                f" not a further seed of {first.name}."
            )


def _unequal_tokens(runs: Sequence[FinishedRun]) -> Iterator[str]:
    """A warning where task tokens differ. Runs whose budget is `total_tokens` are not among them:
    with more replay they have fewer task tokens by design.
    """
    tokens = {
        run.name: run.task_tokens
        for run in runs
        if run.task_tokens is not None and run.settings.get("budget.total_tokens", ABSENT) == ABSENT
    }
    if tokens and max(tokens.values()) - min(tokens.values()) > SAME_TOKENS * max(tokens.values()):
        ends = {min(tokens, key=tokens.__getitem__), max(tokens, key=tokens.__getitem__)}
        shown = ", ".join(f"{name} {count:,}" for name, count in tokens.items() if name in ends)
        among = f"; least and most of {len(tokens)} runs" if len(tokens) > 2 else ""
        yield (
            f"The runs were not trained on the same number of task tokens ({shown}{among}); compare"
            " the curves at equal task tokens, not the last numbers."
        )


def _of_behaviour(runs: Sequence[FinishedRun]) -> Iterator[str]:
    """A warning for each run whose behaviour cannot be compared with that of the first one that
    measured it.
    """
    measured = [run for run in runs if run.final.behaviour]
    for run in runs if measured else ():
        ours, theirs = (r.final.sizes.get(BEHAVIOUR) for r in (run, measured[0]))
        if not run.final.behaviour:
            yield f"The behaviour of {run.name} was not measured after its last step."
        elif ours != theirs:
            yield (
                f"The behaviour of {run.name} was measured with other prompts than that of"
                f" {measured[0].name}: {ours}, not {theirs}. It is not comparable."
            )


def unmeasured_behaviour(runs: Sequence[FinishedRun]) -> str:
    """A sentence where no run has measured behaviour and the base may be a chat model, else
    empty.
    """
    if any(run.final.behaviour for run in runs) or not any(map(_may_be_chat, runs)):
        return ""
    return (
        "Behaviour was not measured: whether the model still answers as the base did is not known,"
        " and no loss on text shows it; `behaviour: every` in a recipe measures it."
    )


def _may_be_chat(run: FinishedRun) -> bool:
    """Whether the base of a run that has not measured behaviour may be a chat model.

    With `behaviour: auto` the run itself has found that it is not, and without a base there is
    nothing to keep. Earlier versions have no such setting.
    """
    base = run.settings.get("model.path", ABSENT)
    if base == ABSENT or run.settings.get("behaviour.when", "off") not in ("off", "False"):
        return False
    tokenizer = run.settings.get("model.tokenizer", ABSENT)
    asked = base if tokenizer == ABSENT else tokenizer
    # That of a hub name is not fetched for a comparison.
    return not Path(asked).is_dir() or has_chat_template(asked)
