"""A recipe goes in, everything it names is opened and checked before training: its sources, its DeepSpeed file.

No torch here: a fault is told within a second.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import ceil
from pathlib import Path
from typing import Any

from bigmix.data.loader import Plan
from bigmix.data.mixture import Mixture, share_at, shares_at
from bigmix.data.shards import Manifest, faults_of_shards, read_manifest
from bigmix.data.stream import Stream
from bigmix.ds_config import fill, read_ds_config
from bigmix.errors import BadInput
from bigmix.objective import Shares
from bigmix.recipe import Recipe

CHECKSUM_BYTES = 1 << 30  # shards beyond this are checked when their first row is read


@dataclass(frozen=True, kw_only=True, slots=True)
class Inputs:
    """What a recipe names, opened: the plan of the rows, the held-out streams, how many steps, DeepSpeed's keys."""

    plan: Plan
    held_out: Mapping[str, Stream]
    steps: int
    ds_keys: Mapping[str, Any]
    tokenizer_folder: Path

    @property
    def manifest(self) -> Manifest:
        """The manifest of the first source; all agree about the tokenizer."""
        return next(iter(self.plan.streams.values())).manifest


def open_inputs(recipe: Recipe, *, ranks: int, verify: bool) -> Inputs:
    """Open and check what a recipe names; `verify` also reads the shards of small sources through.

    Raises BadInput with every fault that is found.
    """
    faults: list[str] = [*_row_faults(recipe, ranks), *_schedule_faults(recipe)]
    ds_keys = _collect(faults, _ds_keys, recipe, ranks)
    sources = {f"sources.{n}.path": s.path for n, s in recipe.sources.items()}
    folders = sources | {f"held_out of {n}": p for n, p in recipe.held_out_paths.items()}
    manifests = {
        path: manifest
        for key, path in folders.items()
        if (manifest := _collect(faults, _manifest, key, path, verify)) is not None
    }
    faults += _tokenizer_faults(manifests)
    if faults:
        raise BadInput(*faults)
    streams = {
        name: _stream(recipe, name, source.path, manifests)
        for name, source in recipe.sources.items()
    }
    held_out = {
        name: _stream(recipe, name, path, manifests) for name, path in recipe.held_out_paths.items()
    }
    faults += [
        fault for stream in (*streams.values(), *held_out.values()) for fault in _empty(stream)
    ]
    if faults:
        raise BadInput(*faults)
    assert ds_keys is not None
    mixture = Mixture({n: s.share for n, s in recipe.sources.items()}, recipe.rows_per_step)
    return Inputs(
        plan=Plan(
            mixture=mixture, streams=streams, rows_per_step=recipe.rows_per_step, seed=recipe.seed
        ),
        held_out=held_out,
        steps=count_steps(recipe, streams),
        ds_keys=ds_keys,
        tokenizer_folder=Path(next(iter(recipe.sources.values())).path) / "tokenizer",
    )


def count_steps(recipe: Recipe, streams: Mapping[str, Stream]) -> int:
    """Optimizer steps that the budget allows, from the mean number of tokens in a row of each source."""
    budget = recipe.budget
    fixed = recipe.train.steps or budget.steps
    if fixed is not None:
        return fixed
    goal = budget.task_tokens or budget.total_tokens
    assert goal is not None
    names = recipe.task_names if budget.task_tokens else tuple(streams)
    row_tokens = {n: streams[n].tokens_per_epoch / streams[n].rows_per_epoch for n in names}
    shares = {name: source.share for name, source in recipe.sources.items()}
    is_constant = all(not isinstance(share, tuple) for share in shares.values())
    last_point = max(
        (share[-1][0] for share in shares.values() if isinstance(share, tuple)), default=0
    )
    tokens, step = 0.0, 0
    while tokens < goal:
        now = shares_at(shares, step)
        gain = recipe.rows_per_step * sum(now[name] * row_tokens[name] for name in names)
        if is_constant or step >= last_point:
            if gain == 0:
                raise BadInput(
                    f"budget.task_tokens is {goal} and cannot be reached: the shares of {', '.join(names)} "
                    "end at 0; raise their last point, or use budget.steps"
                )
            return step + ceil((goal - tokens) / gain)
        tokens += gain
        step += 1
    return step


def accumulation(recipe: Recipe, ranks: int) -> int:
    """Micro-batches of a step on each rank."""
    return recipe.rows_per_step // (ranks * recipe.train.micro_batch_rows)


def shares_of_step(recipe: Recipe, at_step: int) -> Shares:
    """The shares of a step, counted from 1; a schedule's points count the steps that are done."""
    rows = {name: source.share for name, source in recipe.sources.items()}
    loss = {name: source.loss_share or source.share for name, source in recipe.sources.items()}
    return Shares(rows=shares_at(rows, at_step - 1), loss=shares_at(loss, at_step - 1))


def _collect(faults: list[str], check: Any, *arguments: Any) -> Any:
    """The result of a check, or None after its faults are added to the list."""
    try:
        return check(*arguments)
    except BadInput as error:
        faults += error.faults
        return None


def _row_faults(recipe: Recipe, ranks: int) -> Iterator[str]:
    micro_batch = recipe.train.micro_batch_rows
    if recipe.rows_per_step % (ranks * micro_batch):
        unit = ranks * micro_batch
        near = max(unit, round(recipe.rows_per_step / unit) * unit)
        yield (
            f"rows_per_step is {recipe.rows_per_step}, must be a multiple of ranks x train.micro_batch_rows = "
            f"{ranks} x {micro_batch} = {unit}; set rows_per_step={near}, or change the ranks or the micro-batch"
        )


def _schedule_faults(recipe: Recipe) -> Iterator[str]:
    for kind in ("share", "loss_share"):
        shares = {n: getattr(s, kind) or s.share for n, s in recipe.sources.items()}
        points = {at for s in shares.values() if isinstance(s, tuple) for at, _ in s}
        for at in sorted(points):
            if not any(share_at(share, at) for share in shares.values()):
                yield (
                    f"{kind} of every source is 0 at step {at}; at each step one must be above 0, "
                    "move a point or add a constant share"
                )


def _ds_keys(recipe: Recipe, ranks: int) -> Mapping[str, Any]:
    keys = read_ds_config(recipe.deepspeed)
    if recipe.rows_per_step % (ranks * recipe.train.micro_batch_rows) == 0:
        fill(
            keys,
            micro_batch_rows=recipe.train.micro_batch_rows,
            accumulation=accumulation(recipe, ranks),
            ranks=ranks,
            clip=recipe.train.clip,
            dtype=keys_dtype(recipe, keys),
        )
    return keys


def keys_dtype(recipe: Recipe, keys: Mapping[str, Any]) -> str:
    """The precision to hold the file against; where the recipe leaves it open, what the file says."""
    if recipe.model.dtype != "auto":
        return recipe.model.dtype
    return "bf16" if keys.get("bf16", {}).get("enabled") is True else "fp32"


def _manifest(key: str, path: str, verify: bool) -> Manifest:
    try:
        manifest = read_manifest(path)
    except BadInput as error:
        raise BadInput(*(f"{key}: {fault}" for fault in error.faults)) from error
    if not manifest.documents:
        raise BadInput(f"{key}: {path} holds no document; prepare it from an input that has some")
    faults = faults_of_shards(path, manifest, checksum_bytes=CHECKSUM_BYTES if verify else 0)
    if faults:
        raise BadInput(*(f"{key}: {fault}" for fault in faults))
    return manifest


def _tokenizer_faults(manifests: Mapping[str, Manifest]) -> Iterator[str]:
    by_fingerprint: dict[str, str] = {}
    for path, manifest in manifests.items():
        by_fingerprint.setdefault(manifest.tokenizer.fingerprint, path)
    if len(by_fingerprint) > 1:
        first, *others = by_fingerprint.values()
        yield (
            f"{', '.join(others)}: prepared with another tokenizer than {first}; all sources and held-out sets of a "
            "run need the same one, prepare them again with one --tokenizer"
        )


def _stream(recipe: Recipe, name: str, path: str, manifests: Mapping[str, Manifest]) -> Stream:
    source = recipe.sources.get(name)
    return Stream(
        name,
        path,
        manifests[path],
        row_tokens=recipe.sequence_length,
        long_documents=source.long_documents if source is not None else "drop",
        seed=recipe.seed,
    )


def _empty(stream: Stream) -> Iterator[str]:
    if not stream.rows_per_epoch:
        yield (
            f"{stream.name}: none of its {stream.manifest.documents} documents fits a row of this sequence_length; "
            "raise sequence_length, or set long_documents: truncate"
        )
