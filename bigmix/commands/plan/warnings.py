"""Warns of what should be looked at before a run, each warning with its number and a remedy."""

from collections.abc import Iterator
from math import ceil

from bigmix.commands.plan.counts import SourceCounts
from bigmix.commands.plan.forecast import Forecast, Machine
from bigmix.loss.objective import min_rows_for_every_step
from bigmix.recipe import Recipe
from bigmix.terminal import GIB, gib
from bigmix.train.inputs import missing_replay

MOST_EPOCHS = 4  # repeated more often, data teaches less and less (Muennighoff et al., 2023)
MOST_PADDING = 0.15
MOST_DROPPED = 0.05
MOST_DRIFT = 0.05  # of the realised gradient share from the wanted one
USABLE = 0.9  # of a device: its context, the communication library and fragmentation take the rest


def warnings_of(recipe: Recipe, plan: Forecast, machine: Machine) -> list[str]:
    """All warnings, those about single sources first."""
    found: list[str] = []
    for name, source in plan.counts.sources.items():
        found += _rare(recipe, plan, name, source)
        found += _repeated(name, source)
        found += _padded(name, source)
        found += _dropped(name, source)
    sources = plan.counts.sources.items()
    kinds = {name: source.kind for name, source in sources if source.num_rows}
    return [
        *found,
        *missing_replay(recipe, kinds),
        *_drifted(recipe, plan),
        *_too_large(recipe, plan, machine),
    ]


def _rare(recipe: Recipe, plan: Forecast, name: str, source: SourceCounts) -> Iterator[str]:
    if source.mean_rows_per_step >= 1 and source.num_steps >= plan.counts.num_steps:
        return
    if not source.num_rows:
        yield f"{name} has no row at all in this run; raise its share or the budget, or delete it"
        return
    part = source.num_steps / plan.counts.num_steps
    min_rows = min_rows_for_every_step(plan.counts.shares("rows"))
    needed = ceil(min_rows * recipe.rows_per_step / source.mean_rows_per_step)
    effect = (
        "its weight is raised there, so that over the run its part of the gradient is still right"
        if recipe.objective == "per_source"
        else "its part of the gradient comes in bursts"
    )
    yield (
        f"{name} has {source.mean_rows_per_step:.2g} rows a step, so it is in only {part:.0%} of"
        f" the steps; {effect}; to have it in every step, set rows_per_step={needed} or more, or"
        " raise its share"
    )


def _repeated(name: str, source: SourceCounts) -> Iterator[str]:
    if source.epochs <= MOST_EPOCHS:
        return
    part = MOST_EPOCHS / source.epochs
    yield (
        f"{name} is repeated {source.epochs:.1f} times, more than {MOST_EPOCHS}; multiply its share"
        f" or the budget by {part:.2g} or less, or prepare {1 / part:.2f} times as much data"
    )


def _padded(name: str, source: SourceCounts) -> Iterator[str]:
    padding = 1 - source.fill_ratio
    if padding <= MOST_PADDING or not source.num_rows:
        return
    mean, capacity = (n / source.num_rows for n in (source.num_tokens, source.capacity_tokens))
    yield (
        f"{name}: {padding:.0%} of its rows is padding (a row holds {mean:,.0f} of"
        f" {capacity:,.0f} tokens), more than {MOST_PADDING:.0%}; choose another"
        " sequence_length, or put more documents into each shard"
    )


def _dropped(name: str, source: SourceCounts) -> Iterator[str]:
    if source.dropped_fraction <= MOST_DROPPED:
        return
    left_out = source.left_out.items()
    reasons = ", ".join(f"{n:,} {reason.replace('_', ' ')}" for reason, n in left_out if n)
    remedy = (
        f"raise sequence_length or set sources.{name}.long_documents=truncate"
        if source.lost.dropped
        else "see the warnings of `bigmix prepare` about its input"
    )
    yield (
        f"{name}: {source.dropped_fraction:.1%} of its {source.num_read:,} documents are dropped"
        f" ({reasons}), more than {MOST_DROPPED:.0%}; {remedy}"
    )


def _drifted(recipe: Recipe, plan: Forecast) -> Iterator[str]:
    realised, wanted = plan.counts.shares("gradient"), plan.counts.shares("wanted")
    far = [n for n in realised if abs(realised[n] - wanted[n]) > MOST_DRIFT]
    if recipe.objective != "per_token" or not far:
        return
    drifts = ", ".join(f"{n} {realised[n]:.0%} instead of {wanted[n]:.0%}" for n in far)
    yield (
        f"under objective per_token the gradient is divided by loss tokens, not by share: {drifts};"
        " set objective=per_source to learn from the shares as they are written"
    )


def _too_large(recipe: Recipe, plan: Forecast, machine: Machine) -> Iterator[str]:
    needed = plan.memory.peak()
    if needed <= USABLE * machine.device_gib * GIB:
        return
    fits = "does not fit" if needed > machine.device_gib * GIB else "leaves too little room on"
    remedies = "; or ".join(_remedies(recipe, plan)) or "take more GPUs"
    yield (
        f"a rank needs {gib(needed)} at its peak ({plan.memory.peak_phase}), which {fits} "
        f"{machine.device_gib:g} GiB; {remedies}"
    )


def _remedies(recipe: Recipe, plan: Forecast) -> Iterator[str]:
    setting, rows = plan.setting, recipe.train.micro_batch_rows
    if setting.stage < 3:
        yield "set deepspeed=ds_configs/zero3.json"
    if not recipe.model.activation_checkpointing:
        yield "set model.activation_checkpointing=true"
    if rows > 1:
        yield f"set train.micro_batch_rows={rows // 2}"
    if setting.offload("optimizer") == "device" and setting.on_gpu:
        yield "set deepspeed=ds_configs/zero3_offload.json"
    if setting.stage == 3:
        yield "take more GPUs"
