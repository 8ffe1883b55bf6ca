"""Folders of finished runs go in, one record per run comes out, or the list of all that is missing."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import yaml

from bigmix.errors import BadInput
from bigmix.metrics import METRICS, read_lines

RECIPE = "recipe.yaml"
BASE = "base"  # the name of the step-0 model in every output
# A run that saw this much of its budget is whole: rows are packed, so the last step rarely lands on the token.
WHOLE_AT = 0.95

Kind = Literal["one-way", "two-way"]


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainedSource:
    """What the recipe says of a source; `share` and `loss_share` sum to 1, None where they follow a schedule."""

    role: str
    share: float | None
    loss_share: float | None


@dataclass(frozen=True, kw_only=True, slots=True)
class Realised:
    """What part of the run a source was, as logged; each sums to 1 over the sources. None: not logged."""

    rows: float | None
    tokens: float | None
    loss_tokens: float | None
    gradient: float | None


@dataclass(frozen=True, kw_only=True, slots=True)
class HeldOut:
    """One source of one evaluation, in nats/token; `interval` is the 95 % interval of the loss."""

    loss: float
    bits_per_byte: float | None
    interval: tuple[float, float] | None

    @property
    def perplexity(self) -> float:
        """exp(loss); infinite where that is beyond a float."""
        return math.exp(self.loss) if self.loss < 700 else math.inf


@dataclass(frozen=True, kw_only=True, slots=True)
class Evaluation:
    """The model after `step` steps, when it had been trained on `task_tokens` tokens of task sources."""

    step: int
    task_tokens: int
    sources: Mapping[str, HeldOut]


@dataclass(frozen=True, kw_only=True, slots=True)
class Run:
    """One run, as its folder tells it. `settings` are the leaves of its recipe by dotted key."""

    name: str
    folder: Path
    kind: Kind
    steps: int
    sources: Mapping[str, TrainedSource]
    realised: Mapping[str, Realised]
    evaluations: Sequence[Evaluation]
    settings: Mapping[str, str]

    @property
    def first(self) -> Evaluation:
        """The base model: the evaluation before the first step."""
        return self.evaluations[0]

    @property
    def final(self) -> Evaluation:
        """The evaluation after the last step."""
        return self.evaluations[-1]


def read_runs(folders: Sequence[Path]) -> list[Run]:
    """Read every run; raises BadInput with the faults of all of them."""
    if not folders:
        raise BadInput("no run was given, one or more are needed; name the output folders of runs")
    faults: list[str] = []
    runs: list[Run] = []
    for folder, name in zip(folders, _names(folders), strict=True):
        try:
            runs.append(_read_run(folder, name))
        except BadInput as error:
            faults += error.faults
    if faults:
        raise BadInput(*faults)
    return runs


def _names(folders: Sequence[Path]) -> list[str]:
    """The name of each folder, with as many of its parents as it takes to tell them apart."""
    paths = [folder.resolve() for folder in folders]
    repeated = sorted({str(path) for path in paths if paths.count(path) > 1})
    if repeated:
        raise BadInput(*(f"run {path} was given more than once; name it once" for path in repeated))
    return [_name(path, paths) for path in paths]


def _name(path: Path, paths: Sequence[Path]) -> str:
    for depth in range(1, len(path.parts)):
        name = "/".join(path.parts[-depth:])
        others = ["/".join(other.parts[-depth:]) for other in paths if other != path]
        if name != BASE and name not in others:
            return name
    return str(path)


def _read_run(folder: Path, name: str) -> Run:
    missing = [file for file in (RECIPE, METRICS) if not (folder / file).is_file()]
    if missing:
        raise BadInput(*(_missing_file(folder, file) for file in missing))
    recipe = _read_recipe(folder / RECIPE)
    lines = read_lines(folder / METRICS)
    training = [line for line in lines if not line.get("eval")]
    sources = _trained_sources(recipe)
    tasks = [source for source, trained in sources.items() if trained.role == "task"]
    evaluations = _evaluations(lines, tasks)
    faults = list(_faults(folder, recipe, training, evaluations, tasks))
    if faults:
        raise BadInput(*faults)
    return Run(
        name=name,
        folder=folder,
        kind="two-way" if len(tasks) < len(sources) else "one-way",
        steps=training[-1]["step"],
        sources=sources,
        realised=_realised(training, list(sources)),
        evaluations=evaluations,
        settings=dict(_leaves(recipe)),
    )


def _missing_file(folder: Path, file: str) -> str:
    return (
        f"run {folder} has no {file}; a folder that bigmix trained in holds {RECIPE} and {METRICS}; "
        "give the `output` folder of a run"
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


def _evaluations(lines: Sequence[Mapping[str, Any]], tasks: Sequence[str]) -> list[Evaluation]:
    """Every evaluation in order of steps; of two at one step the later counts."""
    task_tokens = {0: 0}
    for line in lines:
        if not line.get("eval"):
            task_tokens[line["step"]] = sum(line.get(f"total_tokens/{task}") or 0 for task in tasks)
    logged_steps = sorted(task_tokens)
    found = {}
    for line in lines:
        if line.get("eval") and (sources := _held_out(line)):
            seen_at = max(step for step in logged_steps if step <= line["step"])
            found[line["step"]] = Evaluation(
                step=line["step"], task_tokens=task_tokens[seen_at], sources=sources
            )
    return [found[step] for step in sorted(found)]


def _held_out(line: Mapping[str, Any]) -> dict[str, HeldOut]:
    prefix = "held_out_loss/"
    names = [key.removeprefix(prefix) for key in line if key.startswith(prefix)]
    return {
        name: HeldOut(
            loss=line[prefix + name],
            bits_per_byte=line.get(f"bits_per_byte/{name}"),
            interval=_interval(line.get(f"held_out_low/{name}"), line.get(f"held_out_high/{name}")),
        )
        for name in names
        if line[prefix + name] is not None
    }


def _interval(low: float | None, high: float | None) -> tuple[float, float] | None:
    return None if low is None or high is None else (low, high)


def _faults(
    folder: Path,
    recipe: Mapping[str, Any],
    training: Sequence[Mapping[str, Any]],
    evaluations: Sequence[Evaluation],
    tasks: Sequence[str],
) -> Iterator[str]:
    if not training:
        yield (
            f"run {folder} has no training line in {METRICS}; a finished run has one for each step; "
            "train it to the end first"
        )
        return
    last_step = training[-1]["step"]
    evaluated = [evaluation.step for evaluation in evaluations]
    shown = ", ".join(map(str, evaluated)) or "none"
    if 0 not in evaluated:
        yield (
            f"run {folder} has evaluations at steps: {shown}; one at step 0 is needed, forgetting is "
            "measured from there; give sources a `held_out` folder and train again"
        )
    if last_step not in evaluated:
        yield (
            f"run {folder} has evaluations at steps: {shown}; one after its last step, {last_step}, is "
            "needed; start the run again with the same command, it goes on to its end"
        )
    yield from _unfinished(folder, recipe, training[-1], tasks)


def _unfinished(
    folder: Path, recipe: Mapping[str, Any], last: Mapping[str, Any], tasks: Sequence[str]
) -> Iterator[str]:
    """Compare what was trained with what the recipe asks for; `train.steps` wins over the budget."""
    budget = dict(recipe.get("budget") or {})
    steps = (recipe.get("train") or {}).get("steps") or budget.get("steps")
    trained_tokens = {
        "task_tokens": sum(last.get(f"total_tokens/{task}") or 0 for task in tasks),
        "total_tokens": sum(last.get(f"total_tokens/{name}") or 0 for name in recipe["sources"]),
    }
    wanted = {"steps": steps} if steps else budget
    for key, value in {"steps": last["step"], **trained_tokens}.items():
        goal = wanted.get(key)
        if isinstance(goal, int | float) and value < WHOLE_AT * goal:
            yield (
                f"run {folder} has trained {value:,} of {goal:,.0f} {key.replace('_', ' ')}; only finished "
                "runs can be compared; start it again with the same command, it goes on to its end"
            )


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


def _leaves(tree: Any, prefix: str = "") -> Iterator[tuple[str, str]]:
    if not isinstance(tree, dict) or not tree:
        yield prefix, "–" if tree is None else str(tree)
        return
    for key, value in tree.items():
        yield from _leaves(value, f"{prefix}.{key}" if prefix else str(key))
