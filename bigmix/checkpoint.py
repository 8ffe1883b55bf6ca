"""Engine and position go in, a folder that is whole or absent comes out, and the way back.

A checkpoint is written to `.tmp-step-N`, listed with sizes and checksums in its `checkpoint.json`, and only then
renamed to `step-N`; `latest` is replaced after that. What is found under its name is whole.
"""

import json
import os
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bigmix.dist import Cluster
from bigmix.engine import Engine
from bigmix.errors import BadInput
from bigmix.files import replace_text, sha256_of

LISTING = "checkpoint.json"
LATEST = "latest"
VERSION = 1


@dataclass(frozen=True, kw_only=True, slots=True)
class Position:
    """Where a run stands: the last finished step, and what its report has added up. The data's place follows from the step."""

    step: int
    report: Mapping[str, Any]


def save(engine: Engine, cluster: Cluster, folder: Path, position: Position, *, keep: int) -> Path:
    """Write a checkpoint of this step; a collective. The newest `keep` remain."""
    final = folder / f"step-{position.step:06d}"
    beside = folder / f".tmp-step-{position.step:06d}"
    if cluster.world.is_first:
        shutil.rmtree(beside, ignore_errors=True)
        beside.mkdir(parents=True)
    cluster.barrier()
    engine.save(folder, beside.name)
    cluster.barrier()
    files = sorted(path for path in beside.rglob("*") if path.is_file())
    own = files[cluster.world.rank :: cluster.world.size]
    listed = cluster.gather({str(path.relative_to(beside)): _sealed(path) for path in own})
    if cluster.world.is_first:
        _publish(beside, final, cluster.world.size, listed, position)
        replace_text(folder / LATEST, final.name + "\n")
        _prune(folder, keep)
    cluster.barrier()
    return final


def newest(folder: Path) -> tuple[Path, Position, int] | None:
    """The newest whole checkpoint with its position and the ranks that wrote it; torn ones are passed over."""
    for path in sorted(folder.glob("step-*"), reverse=True):
        listing = _read_listing(path)
        if listing is not None and not list(faults(path, listing)):
            position = Position(step=listing["step"], report=listing["report"])
            return path, position, listing["ranks"]
    return None


def torn(folder: Path) -> list[str]:
    """What is wrong with each checkpoint newer than the newest whole one, for the user to read."""
    said = []
    for path in sorted(folder.glob("step-*"), reverse=True):
        listing = _read_listing(path)
        if listing is None:
            said.append(f"{path} has no readable {LISTING}")
        elif fault := next(faults(path, listing), None):
            said.append(f"{path}: {fault}")
        else:
            break
    return said


def check_ranks(path: Path, wrote: int, now: int) -> None:
    """Raises BadInput where a checkpoint was written by another number of ranks than would load it."""
    if wrote != now:
        raise BadInput(
            f"{path} was written by {wrote} ranks and this run has {now}; start it with {wrote}, "
            "or begin a new run from an export"
        )


def load(engine: Engine, path: Path) -> None:
    """Put weights and optimizer back; a collective."""
    engine.load(path.parent, path.name)


def faults(path: Path, listing: Mapping[str, Any]) -> Iterator[str]:
    """Each listed file that is missing or not as it was written."""
    for name, (size, checksum) in listing["files"].items():
        file = path / name
        if not file.is_file():
            yield f"{name} is missing"
        elif file.stat().st_size != size:
            yield f"{name} has {file.stat().st_size} bytes, {size} were written"
        elif sha256_of(file) != checksum:
            yield f"the content of {name} has changed since it was written"


def _sealed(path: Path) -> tuple[int, str]:
    """Size and checksum of a file, once it is on the disk and not only on its way there."""
    with path.open("rb") as file:
        os.fsync(file.fileno())
    return path.stat().st_size, sha256_of(path)


def _publish(
    beside: Path, final: Path, ranks: int, listed: list[dict[str, Any]], position: Position
) -> None:
    listing = {
        "version": VERSION,
        "step": position.step,
        "ranks": ranks,
        "files": {name: seal for part in listed for name, seal in part.items()},
        "report": position.report,
    }
    replace_text(beside / LISTING, json.dumps(listing, indent=1) + "\n")
    shutil.rmtree(final, ignore_errors=True)
    beside.rename(final)
    _sync_folder(final.parent)


def _sync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _prune(folder: Path, keep: int) -> None:
    for path in sorted(folder.glob("step-*"))[:-keep]:
        shutil.rmtree(path)


def _read_listing(path: Path) -> dict[str, Any] | None:
    try:
        listing = json.loads((path / LISTING).read_text(encoding="utf-8"))
    except (OSError, json.JSONDecodeError):
        return None
    is_ours = isinstance(listing, dict) and listing.get("version") == VERSION
    return listing if is_ours else None
