"""`bigmix evaluate --lm-eval TASKS`: benchmarks of lm-evaluation-harness on an exported model."""

import argparse
import importlib.util
import inspect
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from bigmix.errors import BadInput
from bigmix.files import replace_text

LM_EVAL = "lm-eval.json"
# Arguments of simple_evaluate that are set here; all others are the user's.
_OURS = ("model", "model_args", "tasks", "task_manager")
_INCLUDE = "include_path"
_KEPT = ("results", "groups", "configs", "versions", "n-shot", "n-samples", "higher_is_better")


def add_lm_eval_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options that are passed on to lm-evaluation-harness."""
    parser.add_argument(
        "--lm-eval",
        metavar="TASKS",
        help=(
            "names of benchmarks of lm-evaluation-harness, separated by commas"
            " (pip install 'bigmix[lm-eval]')"
        ),
    )
    parser.add_argument(
        "--lm-eval-args",
        nargs="+",
        default=[],
        metavar="KEY=VALUE",
        help=(
            "arguments of lm_eval.simple_evaluate, such as num_fewshot=5 limit=100 batch_size=16;"
            " include_path=FOLDER adds tasks"
        ),
    )


def run_lm_eval(model: str, tasks: str, out: Path, arguments: Sequence[str] = ()) -> Path:
    """Score the folder of a model on tasks, whose names are separated by commas, and write
    OUT/lm-eval.json; returns its path.

    `arguments` are KEY=VALUE for simple_evaluate of lm-evaluation-harness. Raises BadInput where
    that is not installed, or has no such argument or task.
    """
    if importlib.util.find_spec("lm_eval") is None:
        raise BadInput("lm-evaluation-harness is not installed; run pip install 'bigmix[lm-eval]'")
    if not (Path(model) / "config.json").is_file():
        raise BadInput(
            f"model {model} has no config.json; give the folder of a model, such as RUN/export"
        )
    # An optional package that takes seconds to import.
    import lm_eval

    known = set(inspect.signature(lm_eval.simple_evaluate).parameters) - set(_OURS) | {_INCLUDE}
    given = _parsed(arguments, known)
    names = [name.strip() for name in tasks.split(",") if name.strip()]
    manager = _manager(names, given.pop(_INCLUDE, None))
    found = lm_eval.simple_evaluate(
        model="hf",
        model_args={"pretrained": model},
        tasks=manager.match_tasks(names),  # a name may contain *
        task_manager=manager,
        **given,
    )
    kept = {key: found[key] for key in _KEPT if key in found}
    report = {"version": 1, "model": model, "tasks": names, "arguments": list(arguments)} | kept
    out.mkdir(parents=True, exist_ok=True)
    replace_text(out / LM_EVAL, json.dumps(report, indent=1, default=str) + "\n")
    return out / LM_EVAL


def _parsed(arguments: Sequence[str], known: set[str]) -> dict[str, Any]:
    given, faults = {}, []
    for argument in arguments:
        key, equals, value = argument.partition("=")
        if not equals or key not in known:
            faults.append(
                f"--lm-eval-args has {argument!r}, must be KEY=VALUE with a KEY of"
                f" {', '.join(sorted(known))}"
            )
        given[key] = yaml.safe_load(value)
    if faults:
        raise BadInput(*faults)
    return given


def _manager(names: Sequence[str], include: str | None) -> Any:
    """The task manager: only of the user's folder where that has all tasks, since listing those of
    the package takes half a minute.
    """
    from lm_eval.tasks import TaskManager

    manager = None
    if include is not None:
        if not Path(include).is_dir():
            raise BadInput(
                f"{_INCLUDE} is {include}, must be a folder with the YAML files of tasks"
            )
        manager = TaskManager(include_path=include, include_defaults=False)
    if manager is None or any(name not in manager.all_tasks for name in names):
        manager = TaskManager(include_path=include)
    unknown = [name for name in names if not manager.match_tasks([name])]
    if unknown or not names:
        raise BadInput(
            f"--lm-eval has {', '.join(unknown) or 'no name'}, which lm-evaluation-harness does"
            f" not know; `lm-eval ls tasks` lists its tasks, {_INCLUDE}=FOLDER adds your own"
        )
    return manager


def show_lm_eval(path: Path) -> None:
    """Print the numbers of an lm-eval.json."""
    results: Mapping[str, Mapping[str, Any]] = json.loads(path.read_text(encoding="utf-8"))[
        "results"
    ]
    for task, scores in results.items():
        for key, value in scores.items():
            name, _, _ = key.partition(",")
            if isinstance(value, float) and not name.endswith("_stderr"):
                error = scores.get(key.replace(name, f"{name}_stderr", 1))
                spread = f" +- {error:.4f}" if isinstance(error, float) else ""
                print(f"{task} {name} {value:.4f}{spread}")
    print(f"wrote {path}", file=sys.stderr)
