"""The commands `bigmix plan`, which forecasts a run before a GPU is used, and `bigmix sweep`, which
lists the runs of a sweep with their progress and what each will train.
"""

import argparse
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from bigmix.commands.arguments import add_recipe_arguments, report_replaced_shards
from bigmix.data.run_plan import RunPlan
from bigmix.errors import DONE, BadInput
from bigmix.recipe import Recipe, SweepRun, load
from bigmix.runs.layout import state_of
from bigmix.terminal import Table, Terminal, quiet_third_party_logs
from bigmix.train.inputs import RunInputs, moving_shares, open_each, open_inputs


@dataclass(frozen=True, kw_only=True, slots=True)
class _Shown:
    """A run of a sweep as it is printed; the names are the keys of the JSON.

    `tokens` is the number of tokens in the rows of each source, with padding.
    """

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
        description=(
            "Checks and lists every run of a sweep; docs/sweep.md says how they are trained."
        ),
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
            f"recipe {known.recipe} has no sweep; add one, such as sweep.train.lr=[1e-5,3e-5],"
            " see docs/sweep.md"
        )
    return show_runs(loaded.chosen, ranks=known.ranks, as_json=known.json)


def show_runs(runs: Sequence[SweepRun], *, ranks: int, as_json: bool) -> int:
    """Check the runs and print them.

    Raises BadInput with all faults of all runs.
    """
    shown = open_each(runs, _shown, ranks=ranks, verify=False)
    if as_json:
        print(json.dumps([asdict(one) for one in shown], indent=2))
        return DONE
    sources = list(dict.fromkeys(name for one in shown for name in one.tokens))
    rows = [
        [one.number, one.name, _state(one), one.steps, *(one.tokens.get(name) for name in sources)]
        for one in shown
    ]
    columns = ["run", "name", "state", "steps", *(f"tokens of {name}" for name in sources)]
    terminal = Terminal()
    terminal.table(Table(title=f"{len(rows)} runs", columns=columns, rows=rows))
    terminal.note("one of them: add sweep.only=RUN to any command")
    return DONE


def _shown(run: SweepRun, inputs: RunInputs) -> _Shown:
    state = state_of(run.recipe, steps=inputs.plan.steps, evaluates=inputs.has_evaluation)
    return _Shown(
        number=run.number,
        name=run.name,
        output=run.recipe.output,
        state=state.kind,
        step=state.step,
        steps=inputs.plan.steps,
        tokens=_tokens(run.recipe, inputs.plan),
        reason=state.reason,
    )


def _tokens(recipe: Recipe, plan: RunPlan) -> dict[str, int]:
    """The number of tokens in each source's rows over the run; the length of rows may change."""
    begins = [min(after, plan.steps) for after, _ in recipe.lengths]
    tokens = dict.fromkeys(recipe.sources, 0)
    for begin, end, (_, length) in zip(
        begins, [*begins[1:], plan.steps], recipe.lengths, strict=True
    ):
        before, after = plan.counts(begin), plan.counts(end)
        for name in tokens:
            tokens[name] += (after[name] - before[name]) * recipe.padded(length)
    return tokens


def _state(shown: _Shown) -> str:
    if shown.state == "begun":
        return f"at step {shown.step} of {shown.steps}"
    if shown.state == "failed":
        return f"failed at step {shown.step}: {(shown.reason or '').splitlines()[0]}"
    return shown.state


def add_plan(subparsers: Any) -> None:
    """Add the command to the parser of `bigmix`."""
    parser = subparsers.add_parser(
        "plan",
        help="forecast a run: shares, epochs, padding, memory, disk, time",
        description=(
            "Forecasts what a recipe will do before anything is trained; docs/plan.md explains"
            " every number."
        ),
    )
    add_recipe_arguments(parser)
    parser.add_argument("--gpus", type=int, default=1, help="ranks over all nodes (default 1)")
    parser.add_argument("--gpu", default="H100", help="their name, or cpu (default H100)")
    parser.add_argument("--device-gib", type=float, default=80, help="their memory (default 80)")
    parser.add_argument(
        "--mfu", type=float, default=0.4, help="part of the peak that is reached (default 0.4)"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.set_defaults(func=_plan)


def _plan(known: argparse.Namespace) -> int:
    quiet_third_party_logs()
    loaded = load(known.recipe, known.overrides)
    _check(known)
    if len(loaded.chosen) > 1:
        return show_runs(loaded.chosen, ranks=known.gpus, as_json=known.json)
    recipe = loaded.chosen[0].recipe if loaded.chosen else loaded.recipe
    inputs = open_inputs(recipe, ranks=known.gpus, verify=False)
    # These take seconds to import, which only a recipe that can run should cost.
    from bigmix.commands.plan.forecast import Machine, forecast
    from bigmix.commands.plan.show import as_json, show
    from bigmix.commands.plan.warnings import warnings_of

    machine = Machine(
        num_gpus=known.gpus, gpu=known.gpu, device_gib=known.device_gib, mfu=known.mfu
    )
    plan, bad = inputs.around_bad_shards(1, lambda plan: forecast(recipe, inputs, plan, machine))
    report_replaced_shards(bad, 1)
    warnings = [*moving_shares(recipe), *warnings_of(recipe, plan, machine)]
    if known.json:
        print(json.dumps(as_json(plan, machine, warnings), indent=2))
    else:
        show(Terminal(), recipe, plan, machine, warnings)
    return DONE


def _check(known: argparse.Namespace) -> None:
    faults = []
    for name, low, high in (("gpus", 1, None), ("device_gib", 1e-9, None), ("mfu", 1e-9, 1)):
        value = getattr(known, name)
        if value < low or (high is not None and value > high):
            limits = f"above 0 and at most {high}" if high else "above 0"
            faults.append(f"--{name.replace('_', '-')} is {value}, must be {limits}")
    if known.gpu not in (gpus := _known_gpus()):
        faults.append(f"--gpu is {known.gpu}, must be one of {', '.join(gpus)}")
    if faults:
        raise BadInput(*faults)


def _known_gpus() -> list[str]:
    # flops imports torch, which only a command that needs it should wait for.
    from bigmix.model.flops import PEAKS

    return [*PEAKS, "cpu"]
