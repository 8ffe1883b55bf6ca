"""What the terminal shows of a run before its first step."""

from collections.abc import Mapping
from typing import Any

from bigmix.cluster.world import World
from bigmix.data.packing import DroppedTokens
from bigmix.data.run_plan import RunPlan
from bigmix.loss.terms import shown_terms, terms_of
from bigmix.model.ds_config import batch_size_of, zero_stage
from bigmix.recipe import Recipe
from bigmix.terminal import Cell, Table, Terminal
from bigmix.types import Choice


def show_header(
    terminal: Terminal,
    recipe: Recipe,
    plan: RunPlan,
    world: World,
    *,
    num_parameters: int,
    keys: Mapping[str, Any],
    dtype: Choice,
    attention: Choice,
    loss: Choice,
) -> None:
    """Show what will be trained on what, before the first step."""
    train, model = recipe.train, recipe.model
    made = model.path or f"{(model.config or {})['model_type']} from scratch, seed {recipe.seed}"
    tokens = recipe.rows_per_step * recipe.longest_row
    micro = f"{batch_size_of(recipe, world.size).num_micro_batches} x {train.micro_batch_rows}"
    rows = [
        ("model", f"{made}, {num_parameters:,} parameters"),
        ("precision", f"{dtype.value} ({dtype.reason})"),
        ("attention", f"{attention.value} ({attention.reason})"),
        ("loss", _loss(recipe, loss)),
        ("engine", f"ZeRO-{zero_stage(keys)} on {world.size} ranks, {recipe.deepspeed}"),
        (
            "step",
            (
                f"{recipe.rows_per_step} rows x {_lengths(recipe)} = {tokens:,} tokens; each rank"
                f" {micro} rows"
            ),
        ),
        ("run", f"{plan.steps:,} steps ({_budget(recipe)})"),
        (
            "optimizer",
            f"AdamW, lr {train.lr:g}, {train.schedule}, warm-up {train.warmup:g}"
            + (f"; evaluated as the average with decay {train.ema:g}" if train.ema else ""),
        ),
        ("output", f"{recipe.output}; tensorboard --logdir {recipe.output}"),
    ]
    terminal.header(f"bigmix: {_way(recipe)} training", rows, _sources(recipe, plan))


def _loss(recipe: Recipe, backend: Choice) -> str:
    """The terms of the objective besides the nll, and what computes them."""
    shown = shown_terms(terms_of(recipe.loss.model_dump()))
    terms = [f"{title} {value:g}" for title, value in shown.items()]
    if recipe.reference is not None:
        weights = ", ".join(
            f"{weight:g} on {name}" for name, weight in recipe.reference.sources.items()
        )
        terms.append(f"KL to {recipe.reference_path} ({weights})")
    by = f"{backend.value} ({backend.reason})"
    return ", ".join([f"objective {recipe.objective}", *terms, f"computed by {by}"])


def _lengths(recipe: Recipe) -> str:
    """The tokens of a row, as they change over the run."""
    return " -> ".join(f"{recipe.padded(length):,}" for _, length in recipe.lengths)


def _way(recipe: Recipe) -> str:
    has_replay = any(source.role == "replay" for source in recipe.sources.values())
    if not recipe.task_names:
        return "pretraining: replay sources only,"
    return "two-way" if has_replay else "one-way"


def _budget(recipe: Recipe) -> str:
    if recipe.train.steps is not None:
        return "train.steps"
    name, value = next((n, v) for n, v in recipe.budget if v is not None)
    return f"{name.replace('_', ' ')} {value:,}"


def _sources(recipe: Recipe, plan: RunPlan) -> Table:
    counts = plan.counts(plan.steps)
    return Table(
        title="sources",
        columns=(
            "source",
            "role",
            "kind",
            "share",
            "documents",
            "rows",
            "epochs",
            "filled",
            "lost",
        ),
        rows=[_source(recipe, plan, name, counts[name]) for name in plan.streams],
    )


def _source(recipe: Recipe, plan: RunPlan, name: str, rows: int) -> list[Cell]:
    stream = plan.streams[name]
    return [
        name,
        recipe.sources[name].role,
        stream.manifest.kind,
        f"{rows / max((plan.steps - plan.segment.after) * recipe.rows_per_step, 1):.1%}",
        stream.manifest.documents,
        rows,
        f"{plan.epochs(plan.steps)[name]:.2f}",
        f"{plan.fill_ratio(name, rows):.1%}",
        _format_dropped(plan.lost(name)),
    ]


def _format_dropped(lost: DroppedTokens) -> str:
    """The documents that packing drops or cuts."""
    parts = [
        f"{lost.dropped:,} too long" if lost.dropped else "",
        f"{lost.truncated:,} cut" if lost.truncated else "",
    ]
    return ", ".join(filter(None, parts)) or "none"
