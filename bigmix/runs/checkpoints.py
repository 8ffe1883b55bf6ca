"""The checkpoints in the folder of a run: their manifests, publishing, and deleting old ones.

A checkpoint is the folder `step-NNNNNN`. It is written as `.tmp-step-NNNNNN`; its manifest
`checkpoint.json`, which lists every file with its size and checksum, is written last, and only then
is the folder renamed. `latest` holds the name of the newest checkpoint.
"""

import json
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from bigmix.data.quarantine import Quarantine
from bigmix.data.records import DataPosition, Decision, RecipeSegment, SourcePosition
from bigmix.files import checksum_of, replace_text, sync_folder

FOLDER = "checkpoints"  # in the output of a run
MANIFEST = "checkpoint.json"
LATEST = "latest"
VERSION = 2
_ASIDE = "aside-"
_NAME = re.compile(r"step-[0-9]+")


@dataclass(frozen=True, kw_only=True, slots=True)
class Position:
    """The position of a run: its last finished step, and all that the next steps follow from.

    report: the sums of the metrics up to here
    losses: the last losses, with which the next one is compared
    recipe: the settings, as plain values
    data: which rows come next
    content: a checksum of the shards of each source
    decisions: those of controllers, oldest first
    """

    step: int
    report: Mapping[str, Any]
    losses: Sequence[float] = ()
    recipe: Mapping[str, Any] = field(default_factory=dict)
    data: DataPosition = field(default_factory=DataPosition)
    content: Mapping[str, str] = field(default_factory=dict)
    decisions: Sequence[Decision] = ()

    @classmethod
    def from_json(cls, value: Any) -> "Position":
        """The position from the plain values of `to_json`."""
        return cls(
            step=int(value["step"]),
            report=value["report"],
            losses=value["losses"],
            recipe=value["recipe"],
            data=DataPosition(
                segment=RecipeSegment(**value["chapter"]),
                sources={
                    name: SourcePosition(**found) for name, found in value["standing"].items()
                },
                quarantine=Quarantine.from_json(value["quarantine"]),
            ),
            content=value["content"],
            # Releases before controllers have written none.
            decisions=[Decision(**decision) for decision in value.get("decisions", ())],
        )

    def to_json(self) -> dict[str, Any]:
        """Plain values, under names of which some are older than those of the fields."""
        values = asdict(self)
        data = values.pop("data")
        decisions = values.pop("decisions")
        return values | {
            "quarantine": self.data.quarantine.to_json(),
            "decisions": decisions,
            "chapter": data["segment"],
            "standing": data["sources"],
        }

    @property
    def trained_tokens(self) -> Mapping[str, int]:
        """The tokens of each source that have been trained."""
        return {name: int(count) for name, count in self.report["totals"]["tokens"].items()}


@dataclass(frozen=True, kw_only=True, slots=True)
class CheckpointFile:
    """A file of a checkpoint as it was written: its size in bytes and 128-bit XXH3 checksum."""

    name: str
    bytes: int
    checksum: str

    def fault(self, folder: Path) -> str | None:
        """What is wrong with the file in the folder of a checkpoint; None if it is as written."""
        path = folder / self.name
        try:
            size_bytes = path.stat().st_size
            if size_bytes != self.bytes:
                return f"{self.name} has {size_bytes} bytes, {self.bytes} were written"
            if checksum_of(path) != self.checksum:
                return f"the content of {self.name} has changed since it was written"
        except FileNotFoundError:
            return f"{self.name} is missing"
        except OSError as error:
            return f"{self.name} cannot be read ({error.strerror})"
        return None


@dataclass(frozen=True, kw_only=True, slots=True)
class CheckpointManifest:
    """A checkpoint as its manifest lists it; its files have not been checked.

    `ranks` is how many ranks have written it.
    """

    path: Path
    position: Position
    ranks: int
    files: tuple[CheckpointFile, ...]


def folders(folder: Path, before: int | None = None) -> list[Path]:
    """The folders that are named like checkpoints, newest first; of steps below `before` if given.

    Whether they are complete is not looked at.
    """
    # Other folders, such as a copy step-000100-keep that the user has made, are left alone.
    named = [path for path in folder.glob("step-*") if _NAME.fullmatch(path.name)]
    found = sorted(named, key=_step_of, reverse=True)
    return [path for path in found if before is None or _step_of(path) < before]


def read_checkpoint(path: Path) -> CheckpointManifest | str:
    """The manifest of a checkpoint, or a message that says what is wrong with it."""
    try:
        manifest = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
        return CheckpointManifest(
            path=path,
            position=Position.from_json(manifest["position"]),
            ranks=manifest["ranks"],
            files=tuple(CheckpointFile(**file) for file in manifest["files"]),
        )
    except (OSError, ValueError, TypeError, KeyError):
        return f"{path} has no readable {MANIFEST}"


def other_versions(folder: Path) -> Iterator[str]:
    """A message for each checkpoint that is written in another version of the format."""
    for path in folders(folder):
        with suppress(OSError, ValueError, TypeError, KeyError):
            version = json.loads((path / MANIFEST).read_text(encoding="utf-8"))["version"]
            if version != VERSION:
                yield (
                    f"{path} is written in version {version} of the format, this program reads"
                    f" {VERSION}; resume with the release that wrote it, or give another output"
                )


def publish(
    temporary: Path,
    final: Path,
    num_ranks: int,
    files: Sequence[CheckpointFile],
    position: Position,
) -> None:
    """Write the manifest of a checkpoint whose files are complete, rename it, and update `latest`.

    In this order, each synced to the disk before the next. Raises OSError where the disk fails.
    """
    manifest = {
        "version": VERSION,
        "ranks": num_ranks,
        "files": [asdict(file) for file in files],
        "position": position.to_json(),
    }
    replace_text(temporary / MANIFEST, json.dumps(manifest, indent=1) + "\n")
    sync_folder(temporary)
    shutil.rmtree(final, ignore_errors=True)
    temporary.rename(final)
    sync_folder(final.parent)
    replace_text(final.parent / LATEST, final.name + "\n")
    sync_folder(final.parent)


def prune(folder: Path, *, keep: int, keep_every: int) -> None:
    """Delete all checkpoints but the newest `keep`, and those of every `keep_every`-th step.

    With `keep_every` 0 only the newest stay.
    """
    for path in folders(folder)[keep:]:
        if not keep_every or _step_of(path) % keep_every:
            shutil.rmtree(path, ignore_errors=True)


def put_aside(folder: Path, *, after_step: int) -> list[Path]:
    """Rename the checkpoints after a step, so that a run that resumes there does not find them.

    Returns their new paths.
    """
    moved = []
    for path in folders(folder):
        if _step_of(path) > after_step:
            aside = path.with_name(_ASIDE + path.name)
            shutil.rmtree(aside, ignore_errors=True)
            moved.append(path.rename(aside))
    return moved


def clear_unfinished(folder: Path) -> None:
    """Delete what interrupted saves have left."""
    for path in folder.glob(".tmp-*"):
        shutil.rmtree(path, ignore_errors=True)


def _step_of(path: Path) -> int:
    return int(path.name.rpartition("-")[2])


def faults_of(listed: CheckpointManifest, part: slice) -> Iterator[str]:
    """A message for each damaged file in a part of a checkpoint's files; reads them all."""
    for file in listed.files[part]:
        fault = file.fault(listed.path)
        if fault is not None:
            yield f"{listed.path}: {fault}"


def newest_step(folder: Path) -> int:
    """The step of the newest checkpoint by `latest`, damaged or not; 0 if there is none."""
    try:
        return max(0, _step_of(Path((folder / LATEST).read_text().strip())))
    except (OSError, ValueError):
        return 0
