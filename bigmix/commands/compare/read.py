"""Reads the folders of finished runs, and reports all that is missing in them at once."""

import json
import re
import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import yaml

from bigmix.commands.compare.findings.answers import ComparedAnswer, read_answers
from bigmix.commands.compare.folders import (
    TaskSample,
    find_result_folders,
    prepared_chats,
    read_samples,
)
from bigmix.commands.compare.measures import Evaluation, evaluations_in
from bigmix.errors import BadInput
from bigmix.recipe.tree import leaves
from bigmix.runs.layout import EVALUATION, EXPORT, RECIPE
from bigmix.runs.metrics_log import METRICS, read_lines

BASE = "base"  # the name of the model before training in every output
ABSENT = "–"  # a setting that is None, and a number that is not known
SEED_FOLDER = re.compile(r"seed-\d+")  # where a sweep puts the runs of a point
# A run that was trained on this part of its tokens is finished: rows are packed, so the last step
# rarely ends at the very token.
FINISHED_AT = 0.95

RunKind = Literal["one-way", "two-way"]


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainedSource:
    """What a recipe says of a source. `share` and `loss_share` sum to 1 over the sources; they are
    None where they follow a schedule.
    """

    role: str
    share: float | None
    loss_share: float | None


@dataclass(frozen=True, kw_only=True, slots=True)
class Realised:
    """What part of a run a source was, as logged: each sums to 1 over the sources, and is None
    where it was not logged.
    """

    rows: float | None
    tokens: float | None
    loss_tokens: float | None
    gradient: float | None


@dataclass(frozen=True, kw_only=True, slots=True)
class FinishedRun:
    """One run, or one model that was evaluated outside of a run, as read from its folder.

    `settings` are those of its recipe by dotted key. `model` is the model that was evaluated
    outside of a run, None for a run. `task_tokens` and `total_tokens` are those of the whole run,
    None where its log is missing. `samples` are the outputs of each task, by step.
    """

    name: str
    folder: Path
    kind: RunKind
    seed: int
    num_steps: int
    sources: Mapping[str, TrainedSource]
    realised: Mapping[str, Realised]
    task_tokens: int | None
    total_tokens: int | None
    evaluations: Sequence[Evaluation]
    settings: Mapping[str, str]
    model: str | None
    command: str
    samples: Mapping[int, Mapping[str, Sequence[TaskSample]]]
    answers: Sequence[ComparedAnswer]
    chats: Mapping[str, bool]

    @property
    def first(self) -> Evaluation:
        """The evaluation before the first step, which is that of the base."""
        return self.evaluations[0]

    @property
    def final(self) -> Evaluation:
        """The evaluation after the last step."""
        return self.evaluations[-1]

    @property
    def replay_share(self) -> float | None:
        """Replay's part of all rows that were trained, as logged; where there is no log, as the
        recipe has it.
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
    """The runs that were read, and why others that were found in a folder were left out."""

    runs: Sequence[FinishedRun]
    left_out: Sequence[str]


def read_runs(given: Sequence[Path]) -> ReadRun:
    """Read every run of the folders given.

    Raises BadInput with the faults of all runs that were named. A run that was only found in a
    folder, such as an unfinished one of a sweep, is left out instead, with the reason.
    """
    if not given:
        raise BadInput("no run was given, one or more are needed; name the output folders of runs")
    faults: list[str] = []
    left_out: list[str] = []
    runs: list[FinishedRun] = []
    results = find_result_folders(given)
    for result, name in zip(results, names_of([r.folder for r in results]), strict=True):
        try:
            runs.append(_read_folder(result.folder, name))
        except BadInput as error:
            if result.is_named:
                faults += error.faults
            else:
                left_out.append(" and ".join(error.faults))
    named = {result.folder for result in results if result.is_named}
    trained = {(run.folder / EXPORT).resolve() for run in runs if run.model is None}
    for run in list(runs):
        # The run itself has the same model, with its curve.
        if run.model and run.folder not in named and Path(run.model).resolve() in trained:
            runs.remove(run)
            left_out.append(f"{run.folder} evaluates the export of a run that is compared too")
    if faults or not runs:
        raise BadInput(*faults, *left_out)
    return ReadRun(runs=runs, left_out=left_out)


def names_of(folders: Sequence[Path]) -> list[str]:
    """The name of each folder, with as many of its parents as make the names differ.

    Raises BadInput where a folder is given more than once.
    """
    paths = [folder.resolve() for folder in folders]
    repeated = sorted({str(path) for path in paths if paths.count(path) > 1})
    if repeated:
        raise BadInput(*(f"run {path} was given more than once; name it once" for path in repeated))
    return [_name(path, paths) for path in paths]


def _name(path: Path, paths: Sequence[Path]) -> str:
    # A folder seed-1 is named with its parent, which names the point.
    for depth in range(2 if SEED_FOLDER.fullmatch(path.name) else 1, len(path.parts)):
        name = "/".join(path.parts[-depth:])
        others = ["/".join(other.parts[-depth:]) for other in paths if other != path]
        if name != BASE and name not in others:
            return name
    return str(path)


def _read_folder(folder: Path, name: str) -> FinishedRun:
    is_evaluation = (folder / EVALUATION).is_file()
    needed = (RECIPE, EVALUATION if is_evaluation else METRICS)
    missing = [file for file in needed if not (folder / file).is_file()]
    if missing:
        raise BadInput(*(_missing_file(folder, file) for file in missing))
    recipe = _read_recipe(folder / RECIPE)
    read = _read_evaluation if is_evaluation else _read_run
    try:
        return read(folder, name, recipe)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise BadInput(
            f"{folder}: {' or '.join(needed)} is not as bigmix writes it ({error!r}); restore it"
            " from a copy"
        ) from error


def _read_run(folder: Path, name: str, recipe: Mapping[str, Any]) -> FinishedRun:
    lines = read_lines(folder / METRICS)
    training = [line for line in lines if not line.get("eval")]
    evaluations = evaluations_in(lines, _tasks(recipe))
    faults = list(_faults(folder, recipe, training, evaluations))
    if faults:
        raise BadInput(*faults)
    again = shlex.quote(f"output={folder}-again")
    command = f"deepspeed launch/train.py {shlex.quote(str(folder / RECIPE))} {again}"
    return _run(
        folder,
        name,
        recipe,
        last_line=training[-1],
        evaluations=evaluations,
        command=command,
        model=None,
    )


def _read_evaluation(folder: Path, name: str, recipe: Mapping[str, Any]) -> FinishedRun:
    """A model that was evaluated outside of a run. Where it is in the folder of a run, recipe and
    log of that run say what it was trained on.
    """
    try:
        found = json.loads((folder / EVALUATION).read_text(encoding="utf-8"))
        lines, model, command = found["lines"], str(found["model"]), str(found["command"])
        steps = [line["step"] for line in lines]
    except (ValueError, KeyError, TypeError) as error:
        raise BadInput(
            f"{folder / EVALUATION} is not as `bigmix evaluate` writes it ({error!r}); evaluate the"
            " model again"
        ) from error
    if len(lines) != 2 or steps[0] != 0:
        raise BadInput(
            f"{folder / EVALUATION} has evaluations at steps {steps}; one of the base, at step 0,"
            " and one of the model are needed, since forgetting is measured from the base; evaluate"
            " again with --base"
        )
    trained_in = Path(model).parent
    log, trained_with = trained_in / METRICS, trained_in / RECIPE
    training = [line for line in (read_lines(log) if log.is_file() else []) if not line.get("eval")]
    last_line = training[-1] if training else {"step": steps[1]}
    if training and trained_with.is_file():
        # The recipe that the model was evaluated with may be that of another run.
        recipe = _read_recipe(trained_with)
    known_tokens, _ = _tokens(last_line, recipe)
    return _run(
        folder,
        name,
        recipe,
        last_line=last_line,
        evaluations=evaluations_in(lines, _tasks(recipe), known_tokens=known_tokens),
        command=command,
        model=model,
    )


def _run(
    folder: Path,
    name: str,
    recipe: Mapping[str, Any],
    *,
    last_line: Mapping[str, Any],
    evaluations: Sequence[Evaluation],
    command: str,
    model: str | None,
) -> FinishedRun:
    sources = _trained_sources(recipe)
    task_tokens, total_tokens = _tokens(last_line, recipe)
    steps = (evaluations[0].step, evaluations[-1].step)
    return FinishedRun(
        name=name,
        folder=folder,
        kind="two-way" if len(_tasks(recipe)) < len(sources) else "one-way",
        seed=int(recipe.get("seed") or 0),
        num_steps=steps[-1],
        sources=sources,
        realised=_realised(last_line, list(sources)),
        task_tokens=task_tokens,
        total_tokens=total_tokens,
        evaluations=evaluations,
        settings={
            key: ABSENT if value is None else str(value) for key, value in leaves(recipe).items()
        },
        model=model,
        command=command,
        samples={step: read_samples(folder, step) for step in steps},
        answers=read_answers(folder, steps[-1]),
        chats={**prepared_chats(_held_out_folders(recipe)), **evaluations[-1].chats},
    )


def _held_out_folders(recipe: Mapping[str, Any]) -> dict[str, str]:
    """The folder of each held-out source, by its name."""
    given = {name: table.get("held_out") for name, table in recipe["sources"].items()}
    given |= recipe.get("held_out") or {}
    paths = {n: v.get("path") if isinstance(v, dict) else v for n, v in given.items()}
    return {name: str(path) for name, path in paths.items() if path}


def _tasks(recipe: Mapping[str, Any]) -> list[str]:
    return [name for name, table in recipe["sources"].items() if table.get("role") == "task"]


def _tokens(line: Mapping[str, Any], recipe: Mapping[str, Any]) -> tuple[int | None, int | None]:
    """The tokens of task sources and of all sources up to a line of the log, None where it has
    none.
    """
    totals = {name: line.get(f"total_tokens/{name}") for name in recipe["sources"]}
    known = {name: count for name, count in totals.items() if count is not None}
    if not known:
        return None, None
    return sum(known.get(task, 0) for task in _tasks(recipe)), sum(known.values())


def _missing_file(folder: Path, file: str) -> str:
    return (
        f"run {folder} has no {file}; the folder of a run has {RECIPE} and {METRICS}; give the"
        " `output` folder of a run, or of a sweep"
    )


def _read_recipe(path: Path) -> dict[str, Any]:
    """A resolved recipe as plain tables.

    It is not read as a `Recipe`, which refuses settings that an earlier version had and adds the
    defaults of this one to those that are compared.
    """
    try:
        recipe = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise BadInput(f"{path} is not YAML ({error}); restore it from a copy") from error
    if not isinstance(recipe, dict) or not isinstance(recipe.get("sources"), dict):
        raise BadInput(
            f"{path} has no table `sources`; a resolved recipe names each source there; restore"
            " it, or copy the recipe that the run was started with into its place"
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
    """Shares that sum to 1; all None where one of them is not one number for the whole run."""
    numbers = {name: share for name, share in shares.items() if isinstance(share, int | float)}
    if len(numbers) < len(shares):
        return dict.fromkeys(shares)
    return {name: share / sum(numbers.values()) for name, share in numbers.items()}


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
            f"run {folder} has evaluations at steps: {shown}; one at step 0 is needed, since"
            " forgetting is measured from there; give sources a `held_out` folder and train again"
        )
    if last_step not in evaluated:
        yield (
            f"run {folder} has evaluations at steps: {shown}; one after its last step, {last_step},"
            " is needed; run the same command again, which continues to the end"
        )
    yield from _unfinished(folder, recipe, training[-1])


def _unfinished(folder: Path, recipe: Mapping[str, Any], last: Mapping[str, Any]) -> Iterator[str]:
    """What is missing of the steps or tokens that the recipe asks for; `train.steps` overrides the
    table `budget`.
    """
    if _may_end_early(recipe) and (folder / EXPORT).is_dir():
        return
    budget = dict(recipe.get("budget") or {})
    steps = (recipe.get("train") or {}).get("steps") or budget.get("steps")
    task_tokens, total_tokens = _tokens(last, recipe)
    trained_tokens = {"task_tokens": task_tokens or 0, "total_tokens": total_tokens or 0}
    wanted = {"steps": steps} if steps else budget
    for key, value in {"steps": last["step"], **trained_tokens}.items():
        goal = wanted.get(key)
        least = 1 if key == "steps" else FINISHED_AT
        if isinstance(goal, int | float) and value < least * goal:
            yield (
                f"run {folder} has trained {value:,} of {goal:,.0f} {key.replace('_', ' ')}; only"
                " finished runs can be compared; run the same command again, which continues to"
                " the end"
            )


def _may_end_early(recipe: Mapping[str, Any]) -> bool:
    """Whether the run ends where a source is used up, whatever its budget."""
    return any(table.get("when_exhausted") == "stop" for table in recipe["sources"].values())


def _realised(last_line: Mapping[str, Any], sources: Sequence[str]) -> dict[str, Realised]:
    """Shares over the whole run, from the last line of its log: all its totals are running ones."""
    totals = {
        key: _normalised({name: last_line.get(f"{key}/{name}") for name in sources})
        for key in ("total_rows", "total_tokens", "total_loss_tokens")
    }
    return {
        name: Realised(
            rows=totals["total_rows"][name],
            tokens=totals["total_tokens"][name],
            loss_tokens=totals["total_loss_tokens"][name],
            gradient=last_line.get(f"gradient_share/{name}"),
        )
        for name in sources
    }
