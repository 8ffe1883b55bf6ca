"""`bigmix sweep RECIPE`: the runs of a sweep, how far each is, and what each will train, before a GPU is used."""

import argparse
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from bigmix.commands.arguments import add_recipe_arguments
from bigmix.errors import DONE, BadInput
from bigmix.recipe import Recipe, SweepRun, load
from bigmix.runs.layout import state_of
from bigmix.sweep_inputs import look_at_all
from bigmix.terminal import Table, Terminal
from bigmix.train.inputs import Inputs


@dataclass(frozen=True, kw_only=True, slots=True)
class _Shown:
    """A run as it is shown; `tokens` are those of the rows of each source, padding counted."""

    number: int
    name: str
    output: str
    state: str
    step: int
    steps: int
    tokens: Mapping[str, int]
    reason: str | None


def add_sweep(subparsers: Any) -> None:
    """Add the command to the parser of `bigmix`."""
    parser = subparsers.add_parser(
        "sweep",
        help="the runs of a sweep, and how far each is",
        description="Checks every run of a sweep and lists them; docs/sweep.md says how they are trained.",
    )
    add_recipe_arguments(parser)
    parser.add_argument(
        "--ranks", type=int, default=1, help="ranks that will train (default 1), for the checks"
    )
    parser.add_argument("--json", action="store_true", help="print a JSON list")
    parser.set_defaults(func=_sweep)


def _sweep(known: argparse.Namespace) -> int:
    if known.ranks < 1:
        raise BadInput(f"--ranks is {known.ranks}, must be 1 or more")
    loaded = load(known.recipe, known.overrides)
    if loaded.recipe.sweep is None:
        raise BadInput(
            f"recipe {known.recipe} is no sweep; give it one, such as sweep.train.lr=[1e-5,3e-5], see docs/sweep.md"
        )
    return show_runs(loaded.chosen, ranks=known.ranks, as_json=known.json)


def show_runs(runs: Sequence[SweepRun], *, ranks: int, as_json: bool) -> int:
    """Check the runs and print them; raises BadInput with all faults of all runs."""
    shown = look_at_all(runs, _shown, ranks=ranks, verify=False)
    if as_json:
        print(json.dumps([asdict(one) for one in shown], indent=2))
        return DONE
    sources = list(dict.fromkeys(name for one in shown for name in one.tokens))
    rows = [
        [one.number, one.name, _words(one), one.steps, *(one.tokens.get(name) for name in sources)]
        for one in shown
    ]
    columns = ["run", "name", "state", "steps", *(f"tokens of {name}" for name in sources)]
    terminal = Terminal()
    terminal.table(Table(title=f"{len(rows)} runs", columns=columns, rows=rows))
    terminal.note("one of them: add sweep.only=RUN to any command")
    return DONE


def _shown(run: SweepRun, inputs: Inputs) -> _Shown:
    state = state_of(run.recipe, steps=inputs.steps, evaluates=inputs.has_exam)
    return _Shown(
        number=run.number,
        name=run.name,
        output=run.recipe.output,
        state=state.kind,
        step=state.step,
        steps=inputs.steps,
        tokens=_tokens(run.recipe, inputs),
        reason=state.reason,
    )


def _tokens(recipe: Recipe, inputs: Inputs) -> dict[str, int]:
    """Tokens of each source's rows over the run, whose length may change."""
    begins = [min(after, inputs.steps) for after, _ in recipe.lengths]
    tokens = dict.fromkeys(recipe.sources, 0)
    for begin, end, (_, length) in zip(
        begins, [*begins[1:], inputs.steps], recipe.lengths, strict=True
    ):
        before, after = inputs.plan.counts(begin), inputs.plan.counts(end)
        for name in tokens:
            tokens[name] += (after[name] - before[name]) * recipe.padded(length)
    return tokens


def _words(shown: _Shown) -> str:
    if shown.state == "begun":
        return f"at step {shown.step} of {shown.steps}"
    if shown.state == "failed":
        return f"failed at step {shown.step}: {(shown.reason or '').splitlines()[0]}"
    return shown.state
