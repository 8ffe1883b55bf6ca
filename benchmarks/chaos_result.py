"""Reads what a run has trained from its folder, to compare it with a plan or another run."""

import hashlib
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from chaos_data import STEPS
from chaos_faults import NOTES, hashes

from bigmix.data.run_plan import RunPlan
from bigmix.recipe import load_recipe
from bigmix.runs.checkpoints import FOLDER, CheckpointManifest, read_checkpoint
from bigmix.train.inputs import RunInputs, open_inputs


@dataclass(frozen=True, kw_only=True, slots=True)
class Trained:
    """What a run has trained.

    rows: the rows of each step, as checksums of their tokens
    losses: the loss of each step
    weights: checksums of the files with weights and moments
    num_repeated: how many steps were trained more than once
    """

    rows: Mapping[int, Counter[str]]
    losses: Mapping[int, float]
    weights: Sequence[str]
    num_repeated: int


def trained(folder: Path) -> Trained:
    """What a run has trained, by its folder."""
    rows, num_repeated = _rows_and_repeats(folder / NOTES)
    metrics = [json.loads(line) for line in (folder / "run/metrics.jsonl").open()]
    # The loss of a step that was skipped is in the file as well.
    losses = {line["step"]: line["loss"] for line in metrics if line["step"] in rows}
    last = last_checkpoint(folder)
    assert isinstance(last, CheckpointManifest), last
    files = [folder / "run/export/model.safetensors", *sorted(last.path.glob("state-*"))]
    weights = [hashlib.sha256(path.read_bytes()).hexdigest() for path in files]
    return Trained(rows=rows, losses=losses, weights=weights, num_repeated=num_repeated)


def _rows_and_repeats(notes: Path) -> tuple[dict[int, Counter[str]], int]:
    """The rows of each step in the last start that trained it, and how many repeats there were."""
    lines: dict[int, dict[str, dict[str, list[Any]]]] = {}
    for path in notes.glob("rows-*"):
        _, began, rank = path.stem.split("-")
        for line in map(json.loads, path.open()):
            lines.setdefault(line["step"], {}).setdefault(began, {}).setdefault(rank, []).append(
                line
            )
    rows, num_repeated = {}, 0
    for step, starts in lines.items():
        newest = max(starts.values(), key=lambda ranks: max(r[-1]["at"] for r in ranks.values()))
        rows[step] = Counter(row for own in newest.values() for row in own[-1]["rows"])
        times = sum(max(_times(own) for own in ranks.values()) for ranks in starts.values())
        num_repeated += max(0, times - 1)
    return {step: found for step, found in rows.items() if found}, num_repeated


def _times(lines: Sequence[Mapping[str, Any]]) -> int:
    return sum(bool(line["rows"]) for line in lines)


def rows_wrong(own: Mapping[int, Counter[str]], expected: Mapping[int, Counter[str]]) -> int:
    """How many rows are missing from a step or should not be in it, over all steps."""
    steps = own.keys() | expected.keys()
    pairs = [(own.get(step, Counter()), expected.get(step, Counter())) for step in steps]
    return sum((a - b).total() + (b - a).total() for a, b in pairs)


def near(own: Mapping[int, float], expected: Mapping[int, float]) -> bool:
    """Whether the losses of the same steps are equal to 1e-5."""
    return own.keys() == expected.keys() and all(
        abs(own[step] - expected[step]) <= 1e-5 * abs(expected[step]) for step in own
    )


def last_checkpoint(folder: Path) -> CheckpointManifest | str:
    """The checkpoint of the last step, or what is wrong with it."""
    return read_checkpoint(folder / "run" / FOLDER / f"step-{STEPS:06d}")


def inputs_of(data: Path, ranks: int) -> RunInputs:
    """The sources of the data, as a run on this number of ranks opens them."""
    paths = [f"sources.{name}.path={data / name}" for name in ("web", "chat")]
    recipe = load_recipe(str(data / "recipe.yaml"), paths)
    return open_inputs(recipe, ranks=ranks, verify=False)


def first_uses(plan: RunPlan) -> dict[str, int]:
    """The step in which each shard is first read, by its path."""
    firsts: dict[str, int] = {}
    for step in range(1, STEPS + 1):
        for row in plan.row_ids(step):
            shards = plan.streams[row.source].manifest.shards
            firsts.setdefault(f"{row.source}/{shards[row.shard].file}", step)
    return firsts


def rows_of(plan: RunPlan) -> dict[int, Counter[str]]:
    """The rows of each step by the plan, as checksums of their tokens."""
    return {
        step: Counter(
            hashes([plan.streams_at(step)[row.source].read(row).ids_T])[0]
            for row in plan.row_ids(step)
        )
        for step in range(1, STEPS + 1)
    }
