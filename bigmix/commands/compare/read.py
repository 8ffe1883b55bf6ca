"""Folders of finished runs go in, one record per run comes out, or the list of all that is
missing.
"""

import json
import re
import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import yaml

from bigmix.commands.compare.folders import (
    ResultFolder,
    TaskSample,
    find_result_folders,
    read_samples,
)
from bigmix.commands.compare.measures import (
    LOSS,
    diverged_in,
    examples_of,
    forgotten,
    sizes_of,
    sources_of,
    tasks_of,
)
from bigmix.errors import BadInput
from bigmix.evaluation.bootstrap import Estimate
from bigmix.recipe.tree import leaves
from bigmix.runs.layout import EVALUATION, EXPORT, RECIPE
from bigmix.runs.metrics_log import METRICS, read_lines

BASE = "base"  # the name of the step-0 model in every output
SEED_FOLDER = re.compile(r"seed-\d+")  # where a sweep puts the runs of a point
# A run that saw this much of its tokens is whole: rows are packed, so the last step rarely lands on
# the token.
WHOLE_AT = 0.95

RunKind = Literal["one-way", "two-way"]


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainedSource:
    """What the recipe says of a source; `share` and `loss_share` sum to 1, None where they follow a
    schedule.
    """

    role: str
    share: float | None
    loss_share: float | None


@dataclass(frozen=True, kw_only=True, slots=True)
class Realised:
    """What part of the run a source was, as logged; each sums to 1 over the sources.

    None: not logged.
    """

    rows: float | None
    tokens: float | None
    loss_tokens: float | None
    gradient: float | None


@dataclass(frozen=True, kw_only=True, slots=True)
class Evaluation:
    """The model after `step` steps, when it had been trained on `task_tokens` tokens of task
    sources, if that is known.

    `sources` holds the measures of each held-out source, `tasks` the scores of each task.
    `diverged` are sources whose loss is not finite, `sizes` says how much each was evaluated on.
    """

    step: int
    task_tokens: int | None
    sources: Mapping[str, Mapping[str, Estimate]]
    tasks: Mapping[str, Mapping[str, Estimate]]
    examples: Mapping[str, int]
    diverged: Sequence[str] = ()
    sizes: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True, slots=True)
class FinishedRun:
    """One run, or one model evaluated outside of a run, as its folder tells it.

    `settings` are the leaves of its recipe by dotted key, `model` is what was evaluated outside of
    a run. Tokens are those of the whole run, None where its log is not at hand. `samples` are
    outputs of each task, by step.
    """

    name: str
    folder: Path
    kind: RunKind
    seed: int
    steps: int
    sources: Mapping[str, TrainedSource]
    realised: Mapping[str, Realised]
    task_tokens: int | None
    total_tokens: int | None
    evaluations: Sequence[Evaluation]
    settings: Mapping[str, str]
    model: str | None
    command: str
    samples: Mapping[int, Mapping[str, Sequence[TaskSample]]]

    @property
    def first(self) -> Evaluation:
        """The base model: the evaluation before the first step."""
        return self.evaluations[0]

    @property
    def final(self) -> Evaluation:
        """The evaluation after the last step."""
        return self.evaluations[-1]

    @property
    def replay_share(self) -> float | None:
        """Replay's part of all rows that were trained, as logged; as written where there is
        no log.
        """
        replays = [name for name, source in self.sources.items() if source.role == "replay"]
        for parts in (
            [self.realised[name].rows for name in replays],
            [self.sources[name].share for name in replays],
        ):
            known = [part for part in parts if part is not None]
            if len(known) == len(replays):
                return sum(known)
        return None


@dataclass(frozen=True, kw_only=True, slots=True)
class ReadRun:
    """The runs that were read, and why others, which were not named one by one, were left out."""

    runs: Sequence[FinishedRun]
    left_out: Sequence[str]


def read_runs(given: Sequence[Path]) -> ReadRun:
    """Read every run; raises BadInput with the faults of all that were named.

    A run that was only found in a folder, such as one of a sweep that is not through, is left out
    and told instead.
    """
    if not given:
        raise BadInput("no run was given, one or more are needed; name the output folders of runs")
    faults: list[str] = []
    left_out: list[str] = []
    runs: list[FinishedRun] = []
    places = find_result_folders(given)
    for place, name in zip(places, names_of([p.folder for p in places]), strict=True):
        try:
            runs.append(_read_place(place, name))
        except BadInput as error:
            if place.is_named:
                faults += error.faults
            else:
                left_out.append(" and ".join(error.faults))
    named = {place.folder for place in places if place.is_named}
    trained = {(run.folder / EXPORT).resolve() for run in runs if run.model is None}
    for run in list(runs):
        # The run itself has the same model, with its curve.
        if run.model and run.folder not in named and Path(run.model).resolve() in trained:
            runs.remove(run)
            left_out.append(f"{run.folder} evaluates the export of a run that is compared itself")
    if faults or not runs:
        raise BadInput(*faults, *left_out)
    return ReadRun(runs=runs, left_out=left_out)


def names_of(folders: Sequence[Path]) -> list[str]:
    """The name of each folder, with as many of its parents as it takes to tell them apart."""
    paths = [folder.resolve() for folder in folders]
    repeated = sorted({str(path) for path in paths if paths.count(path) > 1})
    if repeated:
        raise BadInput(*(f"run {path} was given more than once; name it once" for path in repeated))
    return [_name(path, paths) for path in paths]


def _name(path: Path, paths: Sequence[Path]) -> str:
    # A folder seed-1 says nothing without the point that it is of.
    for depth in range(2 if SEED_FOLDER.fullmatch(path.name) else 1, len(path.parts)):
        name = "/".join(path.parts[-depth:])
        others = ["/".join(other.parts[-depth:]) for other in paths if other != path]
        if name != BASE and name not in others:
            return name
    return str(path)


def _read_place(place: ResultFolder, name: str) -> FinishedRun:
    is_evaluation = (place.folder / EVALUATION).is_file()
    needed = (RECIPE, EVALUATION if is_evaluation else METRICS)
    missing = [file for file in needed if not (place.folder / file).is_file()]
    if missing:
        raise BadInput(*(_missing_file(place.folder, file) for file in missing))
    recipe = _read_recipe(place.folder / RECIPE)
    read = _read_evaluation if is_evaluation else _read_run
    try:
        return read(place.folder, name, recipe)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise BadInput(
            f"{place.folder}: {' or '.join(needed)} is not as bigmix writes it ({error!r}); restore"
            " it from a copy"
        ) from error


def _read_run(folder: Path, name: str, recipe: Mapping[str, Any]) -> FinishedRun:
    lines = read_lines(folder / METRICS)
    training = [line for line in lines if not line.get("eval")]
    evaluations = _evaluations(lines, _tasks(recipe))
    faults = list(_faults(folder, recipe, training, evaluations))
    if faults:
        raise BadInput(*faults)
    again = shlex.quote(f"output={folder}-again")
    command = f"deepspeed launch/train.py {shlex.quote(str(folder / RECIPE))} {again}"
    return _run(
        folder,
        name,
        recipe,
        training=training,
        evaluations=evaluations,
        command=command,
        model=None,
    )


def _read_evaluation(folder: Path, name: str, recipe: Mapping[str, Any]) -> FinishedRun:
    """A model that was evaluated outside of a run; where it lies in the folder of one, that run's
    log says what it saw.
    """
    try:
        found = json.loads((folder / EVALUATION).read_text(encoding="utf-8"))
        lines, model, command = found["lines"], str(found["model"]), str(found["command"])
        steps = [line["step"] for line in lines]
    except (ValueError, KeyError, TypeError) as error:
        raise BadInput(
            f"{folder / EVALUATION} is not as an evaluation writes it ({error!r}); evaluate the"
            " model again"
        ) from error
    if len(lines) != 2 or steps[0] != 0:
        raise BadInput(
            f"{folder / EVALUATION} has evaluations at steps {steps}; one of the base, step 0, and"
            " one of the model are needed, forgetting is measured from the base; evaluate again"
            " with --base"
        )
    trained_in = Path(model).parent
    log, trained_with = trained_in / METRICS, trained_in / RECIPE
    training = [line for line in (read_lines(log) if log.is_file() else []) if not line.get("eval")]
    logged = training[-1:] or [{"step": steps[1]}]
    if training and trained_with.is_file():
        # What it is evaluated with may be the recipe of another run.
        recipe = _read_recipe(trained_with)
    evaluations = _evaluations(lines, _tasks(recipe), known_tokens=_tokens(logged[-1], recipe)[0])
    return _run(
        folder, name, recipe, training=logged, evaluations=evaluations, command=command, model=model
    )


def _run(
    folder: Path,
    name: str,
    recipe: Mapping[str, Any],
    *,
    training: Sequence[Mapping[str, Any]],
    evaluations: Sequence[Evaluation],
    command: str,
    model: str | None,
) -> FinishedRun:
    sources = _trained_sources(recipe)
    task_tokens, total_tokens = _tokens(training[-1], recipe)
    steps = (evaluations[0].step, evaluations[-1].step)
    return FinishedRun(
        name=name,
        folder=folder,
        kind="two-way" if len(_tasks(recipe)) < len(sources) else "one-way",
        seed=int(recipe.get("seed") or 0),
        steps=steps[-1],
        sources=sources,
        realised=_realised(training, list(sources)),
        task_tokens=task_tokens,
        total_tokens=total_tokens,
        evaluations=evaluations,
        settings={
            key: "–" if value is None else str(value) for key, value in leaves(recipe).items()
        },
        model=model,
        command=command,
        samples={step: read_samples(folder, step) for step in steps},
    )


def _tasks(recipe: Mapping[str, Any]) -> list[str]:
    return [name for name, table in recipe["sources"].items() if table.get("role") == "task"]


def _tokens(line: Mapping[str, Any], recipe: Mapping[str, Any]) -> tuple[int | None, int | None]:
    """Tokens of task sources and of all, up to a line of training; None where they are not
    logged.
    """
    totals = {name: line.get(f"total_tokens/{name}") for name in recipe["sources"]}
    known = {name: count for name, count in totals.items() if count is not None}
    if not known:
        return None, None
    return sum(known.get(task, 0) for task in _tasks(recipe)), sum(known.values())


def _missing_file(folder: Path, file: str) -> str:
    return (
        f"run {folder} has no {file}; a folder that bigmix trained in holds {RECIPE} and {METRICS};"
        " give the `output` folder of a run, or of a sweep"
    )


def _read_recipe(path: Path) -> dict[str, Any]:
    try:
        recipe = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise BadInput(f"{path} is not YAML ({error}); restore it from a copy") from error
    if not isinstance(recipe, dict) or not isinstance(recipe.get("sources"), dict):
        raise BadInput(
            f"{path} has no table `sources`; a resolved recipe names each source there; "
            "restore it, or copy in the recipe that the run was started with"
        )
    return recipe


def _trained_sources(recipe: Mapping[str, Any]) -> dict[str, TrainedSource]:
    tables: Mapping[str, Mapping[str, Any]] = recipe["sources"]
    grouped = any(table.get("group") for table in tables.values())
    shares = _normalised({n: None if grouped else t.get("share") for n, t in tables.items()})
    loss_shares = _normalised(
        {n: None if grouped else t.get("loss_share") or t.get("share") for n, t in tables.items()}
    )
    return {
        name: TrainedSource(
            role=str(table.get("role")), share=shares[name], loss_share=loss_shares[name]
        )
        for name, table in tables.items()
    }


def _normalised(shares: Mapping[str, Any]) -> dict[str, float | None]:
    """Shares as parts of 1; all None where one of them is no number for the whole run."""
    numbers = {name: share for name, share in shares.items() if isinstance(share, int | float)}
    if len(numbers) < len(shares):
        return dict.fromkeys(shares)
    return {name: share / sum(numbers.values()) for name, share in numbers.items()}


def _evaluations(
    lines: Sequence[Mapping[str, Any]], tasks: Sequence[str], known_tokens: int | None = None
) -> list[Evaluation]:
    """Every evaluation in order of steps; of two at one step the later counts.

    `known_tokens` are the task tokens of a model whose training is not in the lines.
    """
    task_tokens = {0: 0}
    for line in lines:
        if not line.get("eval"):
            task_tokens[line["step"]] = sum(line.get(f"total_tokens/{task}") or 0 for task in tasks)
    logged_steps = sorted(task_tokens)
    evaluated = {line["step"]: line for line in lines if line.get("eval") and _says_a_loss(line)}
    first = sources_of(evaluated[min(evaluated)]) if evaluated else {}
    found = []
    for step in sorted(evaluated):
        line = evaluated[step]
        seen_at = max(logged for logged in logged_steps if logged <= step)
        found.append(
            Evaluation(
                step=step,
                task_tokens=(
                    known_tokens if step and len(logged_steps) == 1 else task_tokens[seen_at]
                ),
                sources={
                    name: (
                        measures
                        | (
                            forgotten(line, name, before=first[name][LOSS].value)
                            if name in first
                            else {}
                        )
                    )
                    for name, measures in sources_of(line).items()
                },
                tasks=tasks_of(line),
                examples=examples_of(line),
                diverged=diverged_in(line),
                sizes=sizes_of(line),
            )
        )
    return found


def _says_a_loss(line: Mapping[str, Any]) -> bool:
    return bool(sources_of(line) or tasks_of(line) or diverged_in(line))


def _faults(
    folder: Path,
    recipe: Mapping[str, Any],
    training: Sequence[Mapping[str, Any]],
    evaluations: Sequence[Evaluation],
) -> Iterator[str]:
    if not training:
        yield (
            f"run {folder} has no training line in {METRICS}; a finished run has one for each step;"
            " train it to the end first"
        )
        return
    last_step = training[-1]["step"]
    evaluated = [evaluation.step for evaluation in evaluations]
    shown = ", ".join(map(str, evaluated)) or "none"
    if 0 not in evaluated:
        yield (
            f"run {folder} has evaluations at steps: {shown}; one at step 0 is needed, forgetting"
            " is measured from there; give sources a `held_out` folder and train again"
        )
    if last_step not in evaluated:
        yield (
            f"run {folder} has evaluations at steps: {shown}; one after its last step, {last_step},"
            " is needed; start the run again with the same command, it goes on to its end"
        )
    yield from _unfinished(folder, recipe, training[-1])


def _unfinished(folder: Path, recipe: Mapping[str, Any], last: Mapping[str, Any]) -> Iterator[str]:
    """Compare what was trained with what the recipe asks for; `train.steps` wins over the
    budget.
    """
    if _may_end_before(recipe) and (folder / EXPORT).is_dir():
        return
    budget = dict(recipe.get("budget") or {})
    steps = (recipe.get("train") or {}).get("steps") or budget.get("steps")
    task_tokens, total_tokens = _tokens(last, recipe)
    trained_tokens = {"task_tokens": task_tokens or 0, "total_tokens": total_tokens or 0}
    wanted = {"steps": steps} if steps else budget
    for key, value in {"steps": last["step"], **trained_tokens}.items():
        goal = wanted.get(key)
        least = 1 if key == "steps" else WHOLE_AT
        if isinstance(goal, int | float) and value < least * goal:
            yield (
                f"run {folder} has trained {value:,} of {goal:,.0f} {key.replace('_', ' ')}; only"
                " finished runs can be compared; start it again with the same command, it goes on"
                " to its end"
            )


def _may_end_before(recipe: Mapping[str, Any]) -> bool:
    """Whether the run ends where a source is used up, whatever its budget."""
    return any(table.get("when_exhausted") == "stop" for table in recipe["sources"].values())


def _realised(training: Sequence[Mapping[str, Any]], sources: Sequence[str]) -> dict[str, Realised]:
    """Shares over the whole run, from its last line: all of them are running totals."""
    totals = {
        key: _normalised({name: training[-1].get(f"{key}/{name}") for name in sources})
        for key in ("total_rows", "total_tokens", "total_loss_tokens")
    }
    return {
        name: Realised(
            rows=totals["total_rows"][name],
            tokens=totals["total_tokens"][name],
            loss_tokens=totals["total_loss_tokens"][name],
            gradient=training[-1].get(f"gradient_share/{name}"),
        )
        for name in sources
    }
