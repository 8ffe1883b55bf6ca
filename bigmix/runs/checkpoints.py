"""The folder of a run's checkpoints goes in; out comes which of them are there, which files each
has, which must go.

A checkpoint is the folder `step-NNNNNN`. It is written as `.tmp-step-NNNNNN`; `checkpoint.json`,
which lists every file with its size and checksum, is written last, and only then is the folder
renamed. `latest` holds the name of the newest.
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
LISTING = "checkpoint.json"
LATEST = "latest"
VERSION = 2
_ASIDE = "aside-"
_NAME = re.compile(r"step-[0-9]+")


@dataclass(frozen=True, kw_only=True, slots=True)
class Position:
    """Where a run stands: the last finished step, and what the next ones follow from.

    `report` is what its report has added up, `losses` what the next one is held against, `recipe`
    the settings as plain values, `data` which rows come next and `content` a checksum of the shards
    of each source; `decisions` are those of controllers, oldest first.
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
        """What `to_json` gave."""
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
            # Releases without controllers wrote none.
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
        """Tokens of each source that were trained until now."""
        return {name: int(count) for name, count in self.report["totals"]["tokens"].items()}


@dataclass(frozen=True, kw_only=True, slots=True)
class CheckpointFile:
    """A file of a checkpoint as it was written: bytes and XXH3 checksum of 128 bits."""

    name: str
    bytes: int
    checksum: str

    def fault(self, folder: Path) -> str | None:
        """What is wrong with the file in a checkpoint's folder, None where it is as it was
        written.
        """
        path = folder / self.name
        try:
            found = path.stat().st_size
            if found != self.bytes:
                return f"{self.name} has {found} bytes, {self.bytes} were written"
            if checksum_of(path) != self.checksum:
                return f"the content of {self.name} has changed since it was written"
        except FileNotFoundError:
            return f"{self.name} is missing"
        except OSError as error:
            return f"{self.name} cannot be read ({error.strerror})"
        return None


@dataclass(frozen=True, kw_only=True, slots=True)
class CheckpointManifest:
    """A checkpoint by its listing; whether its files are as listed is not known yet."""

    path: Path
    position: Position
    ranks: int
    files: tuple[CheckpointFile, ...]


def folders(folder: Path, before: int | None = None) -> list[Path]:
    """The checkpoints of a run by their names, newest first; those of a step below `before` where
    that is given.
    """
    # What the user has put beside them, such as a copy step-000100-keep, is none of ours.
    named = [path for path in folder.glob("step-*") if _NAME.fullmatch(path.name)]
    found = sorted(named, key=_step_of, reverse=True)
    return [path for path in found if before is None or _step_of(path) < before]


def read_checkpoint(path: Path) -> CheckpointManifest | str:
    """The listing of a checkpoint, or what is wrong with it."""
    try:
        listing = json.loads((path / LISTING).read_text(encoding="utf-8"))
        return CheckpointManifest(
            path=path,
            position=Position.from_json(listing["position"]),
            ranks=listing["ranks"],
            files=tuple(CheckpointFile(**file) for file in listing["files"]),
        )
    except (OSError, ValueError, TypeError, KeyError):
        return f"{path} has no readable {LISTING}"


def other_versions(folder: Path) -> Iterator[str]:
    """What to do about each checkpoint of a run that is written in another version of the
    format.
    """
    for path in folders(folder):
        with suppress(OSError, ValueError, TypeError, KeyError):
            version = json.loads((path / LISTING).read_text(encoding="utf-8"))["version"]
            if version != VERSION:
                yield (
                    f"{path} is written in version {version} of the format, this program reads"
                    f" {VERSION}; go on with the release that wrote it, or give another output"
                )


def publish(
    beside: Path, final: Path, ranks: int, files: Sequence[CheckpointFile], position: Position
) -> None:
    """Write the listing of a checkpoint whose files are whole, give it its name, and point `latest`
    at it, in this order.
    """
    listing = {
        "version": VERSION,
        "ranks": ranks,
        "files": [asdict(file) for file in files],
        "position": position.to_json(),
    }
    replace_text(beside / LISTING, json.dumps(listing, indent=1) + "\n")
    sync_folder(beside)
    shutil.rmtree(final, ignore_errors=True)
    beside.rename(final)
    sync_folder(final.parent)
    replace_text(final.parent / LATEST, final.name + "\n")
    sync_folder(final.parent)


def prune(folder: Path, *, keep: int, keep_every: int) -> None:
    """Delete all but the newest `keep` checkpoints and those of every `keep_every`-th step (0: of
    none).
    """
    for path in folders(folder)[keep:]:
        if not keep_every or _step_of(path) % keep_every:
            shutil.rmtree(path, ignore_errors=True)


def put_aside(folder: Path, *, after_step: int) -> list[Path]:
    """Rename the checkpoints after a step, so that a run that goes on from there does not meet them
    again.
    """
    moved = []
    for path in folders(folder):
        if _step_of(path) > after_step:
            aside = path.with_name(_ASIDE + path.name)
            shutil.rmtree(aside, ignore_errors=True)
            moved.append(path.rename(aside))
    return moved


def clear_unfinished(folder: Path) -> None:
    """Delete what a save that was cut off has left."""
    for path in folder.glob(".tmp-*"):
        shutil.rmtree(path, ignore_errors=True)


def _step_of(path: Path) -> int:
    return int(path.name.rpartition("-")[2])


def faults_of(listed: CheckpointManifest, part: slice) -> Iterator[str]:
    """What is wrong with some of a checkpoint's files, which are read through."""
    for file in listed.files[part]:
        fault = file.fault(listed.path)
        if fault is not None:
            yield f"{listed.path}: {fault}"


def newest_step(folder: Path) -> int:
    """The step of the newest checkpoint by its name, whole or not; 0 where there is none."""
    try:
        return max(0, _step_of(Path((folder / LATEST).read_text().strip())))
    except (OSError, ValueError):
        return 0
