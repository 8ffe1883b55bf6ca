"""Shows a forecast: tables for the terminal, and JSON."""

from collections.abc import Iterator
from typing import Any

from bigmix.commands.plan.counts import SourceCounts
from bigmix.commands.plan.forecast import AnswerCost, Forecast, Machine
from bigmix.commands.plan.memory import PHASES, PLACES
from bigmix.commands.plan.shape import Shape
from bigmix.recipe import Recipe
from bigmix.terminal import GIB, Cell, Table, Terminal, duration, gib_or_mib, percent

JSON_VERSION = 1
UNITS = ("rows", "tokens", "loss_tokens", "gradient")


def show(
    terminal: Terminal, recipe: Recipe, plan: Forecast, machine: Machine, warnings: list[str]
) -> None:
    """Print the forecast: settings, sources, shares, documents and memory, then the warnings."""
    terminal.header("bigmix: plan", list(_settings(recipe, plan, machine)), _sources(plan))
    for table in (_shares(plan), _documents(plan), _memory(plan)):
        terminal.note("")
        terminal.table(table)
    terminal.note("")
    for warning in warnings:
        terminal.warning(warning)
    if not warnings:
        terminal.note("no warnings")


def as_json(plan: Forecast, machine: Machine, warnings: list[str]) -> dict[str, Any]:
    """The forecast as plain values: bytes are whole numbers, shares and ratios are between 0 and
    1.
    """
    memory = plan.memory
    shares = {unit: plan.counts.shares(unit) for unit in (*UNITS, "wanted")}
    return {
        "version": JSON_VERSION,
        "steps": plan.counts.num_steps,
        "exact": plan.counts.is_exact,
        "parameters": plan.shape.num_parameters,
        "flops": plan.flops,
        "seconds": plan.seconds,
        "behaviour": _behaviour_json(plan.behaviour),
        "gpus": machine.num_gpus,
        "sources": {
            name: _source_json(source) | {"share": {unit: shares[unit][name] for unit in shares}}
            for name, source in plan.counts.sources.items()
        },
        "memory": {
            "peak_phase": memory.peak_phase,
            "device": memory.peak(),
            "host": memory.peak("host"),
            "nvme": memory.peak("nvme"),
            "parts": [
                {"name": part.name, "place": part.place}
                | {phase: getattr(part, phase) for phase in PHASES}
                for part in memory.parts
            ],
        },
        "disk": {
            "checkpoint": plan.disk.checkpoint_bytes,
            "checkpoints": plan.disk.checkpoints_bytes,
            "export": plan.disk.export_bytes,
        },
        "warnings": warnings,
    }


def _behaviour_json(cost: AnswerCost | None) -> dict[str, Any] | None:
    if cost is None:
        return None
    return {
        "prompts": cost.num_prompts,
        "evaluations": cost.num_evaluations,
        "tokens_per_evaluation": cost.tokens_per_evaluation,
        "tokens": cost.tokens,
        "seconds": cost.seconds,
    }


def _source_json(source: SourceCounts) -> dict[str, Any]:
    return {
        "role": source.role,
        "kind": source.kind,
        "rows": source.num_rows,
        "tokens": source.num_tokens,
        "loss_tokens": source.num_loss_tokens,
        "epochs": source.epochs,
        "filled": source.fill_ratio,
        "rows_per_step": source.mean_rows_per_step,
        "steps": source.num_steps,
        "read": source.num_read,
        "documents": source.num_documents,
        "dropped": dict(source.dropped),
        "too_long": source.lost.dropped,
        "truncated": source.lost.truncated,
        "tokens_lost": source.lost.num_tokens,
    }


def _settings(recipe: Recipe, plan: Forecast, machine: Machine) -> Iterator[tuple[str, str]]:
    setting, disk = plan.setting, plan.disk
    unit = "ranks on CPUs" if machine.gpu == "cpu" else f"x {machine.gpu}"
    micro = f"{setting.keys['gradient_accumulation_steps']} x {recipe.train.micro_batch_rows} rows"
    yield "model", f"{_name(recipe)}, {_sizes(plan.shape)}"
    yield "precision", f"{setting.dtype}, attention {plan.attention}"
    yield "engine", f"ZeRO-{setting.stage} on {machine.num_gpus} {unit}, {recipe.deepspeed}"
    yield (
        "run",
        f"{plan.counts.num_steps:,} steps of {recipe.rows_per_step} rows; each rank {micro}",
    )
    yield "memory", _memory_summary(plan, machine)
    export = f"; export {gib_or_mib(disk.export_bytes)}" if disk.export_bytes else ""
    yield (
        "disk",
        f"{gib_or_mib(disk.checkpoint_bytes)} a checkpoint, up to"
        f" {gib_or_mib(disk.checkpoints_bytes)} with the one being written{export}",
    )
    yield "time", _time(plan, machine)
    if plan.behaviour is not None:
        yield "behaviour", _behaviour(plan.behaviour)


def _name(recipe: Recipe) -> str:
    return recipe.model.path or f"{(recipe.model.config or {})['model_type']} from scratch"


def _sizes(shape: Shape) -> str:
    tied = ", head tied to the embedding" if shape.is_tied else ""
    layers = f"{shape.num_layers} layers of {shape.hidden_size:,}"
    return f"{shape.num_parameters:,} parameters, {layers}{tied}"


def _memory_summary(plan: Forecast, machine: Machine) -> str:
    memory = plan.memory
    summary = (
        f"{gib_or_mib(memory.peak())} of {machine.device_gib:g} GiB at the peak of a rank"
        f" ({memory.peak_phase})"
    )
    for place in PLACES[1:]:
        size = memory.peak(place)
        summary += f", {gib_or_mib(size)} on {place}" if size else ""
    return summary


def _time(plan: Forecast, machine: Machine) -> str:
    if plan.seconds is None:
        why = "on CPUs" if machine.gpu == "cpu" else "for a mixture of experts"
        return f"not known {why}"
    gpu_hours = plan.seconds / 3600 * machine.num_gpus
    return (
        f"{duration(plan.seconds)} at MFU {machine.mfu:.0%} ({plan.flops:.3g} FLOPs,"
        f" {gpu_hours:,.1f} GPU hours)"
    )


def _behaviour(cost: AnswerCost) -> str:
    about = "" if cost.seconds is None else f"; about {duration(cost.seconds)} on top of the time"
    return (
        f"{cost.num_prompts} prompts in {cost.num_evaluations} evaluations: up to"
        f" {cost.tokens_per_evaluation:,} tokens each, {cost.tokens:,} in all{about}"
    )


def _sources(plan: Forecast) -> Table:
    about = "" if plan.counts.is_exact else ", about"
    heads = (
        "source",
        "role",
        "kind",
        "rows",
        f"tokens{about}",
        f"loss tokens{about}",
        "epochs",
        "filled",
        "in steps",
    )
    return Table(
        title="sources",
        columns=heads,
        rows=[
            [
                name,
                source.role,
                source.kind,
                source.num_rows,
                source.num_tokens,
                source.num_loss_tokens,
                f"{source.epochs:.2f}",
                percent(source.fill_ratio),
                percent(source.num_steps / plan.counts.num_steps, 0),
            ]
            for name, source in plan.counts.sources.items()
        ],
    )


def _shares(plan: Forecast) -> Table:
    shares = [plan.counts.shares(unit) for unit in (*UNITS, "wanted")]
    return Table(
        title="shares of the run",
        columns=("source", *(unit.replace("_", " ") for unit in UNITS), "gradient in the recipe"),
        rows=[[name, *(percent(each[name]) for each in shares)] for name in plan.counts.sources],
    )


def _documents(plan: Forecast) -> Table:
    rows: list[list[Cell]] = []
    for name, source in plan.counts.sources.items():
        reasons = ", ".join(
            f"{n:,} {reason.replace('_', ' ')}" for reason, n in source.dropped.items() if n
        )
        lost = source.lost
        rows.append(
            [
                name,
                source.num_read,
                reasons or "none",
                lost.dropped,
                lost.truncated,
                lost.num_tokens,
            ]
        )
    heads = ("source", "read", "dropped by prepare", "too long for a row", "cut", "tokens lost")
    return Table(title="documents left out", columns=heads, rows=rows)


def _memory(plan: Forecast) -> Table:
    memory = plan.memory
    size, unit = (GIB, "GiB") if memory.peak() >= GIB else (1 << 20, "MiB")
    rows: list[list[Cell]] = []
    for part in memory.parts:
        sizes = [getattr(part, phase) / size for phase in PHASES]
        rows.append([part.name, part.place, *(f"{n:,.2f}" if n else None for n in sizes)])
    for place in PLACES:
        if memory.peak(place):
            totals = (f"{memory.total(phase, place) / size:,.2f}" for phase in PHASES)
            rows.append([f"all on the {place}", place, *totals])
    heads = ("part", "place", *PHASES)
    return Table(title=f"memory of a rank, {unit}", columns=heads, rows=rows)
