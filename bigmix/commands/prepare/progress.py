"""Keeps the progress of each part of a job on disk, and merges the parts into one source.

The progress file of a part is replaced after each shard, and the same command continues from it.
Merging takes from these files what the parts have written, and writes the manifest last.
"""

import shutil
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from bigmix.data.shards.location import MANIFEST
from bigmix.data.shards.manifest import (
    LENGTHS,
    Manifest,
    ShardTable,
    Statistics,
    faults_of_shards,
    write_manifest,
)
from bigmix.data.shards.shard import with_lengths
from bigmix.errors import BadInput
from bigmix.files import lock_if_supported, replace_text

PARTS = "parts"
SHARD = "shard-"
TOKENIZER_FOLDER = "tokenizer"
HELD_OUT = "-held-out"


class Progress(BaseModel):
    """How far a part, counted from 0, of `parts` is.

    Record `row` of piece `piece` comes next; all records before it are done. `identity` is
    everything that the tokens depend on: parts with different identities cannot be merged, and a
    part is continued only with its own identity.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    version: Literal[1] = 1
    part: int
    parts: int
    identity: dict[str, str]
    piece: int = 0
    row: int = 0
    first_dropped: dict[str, str] = {}
    source: Manifest
    held_out: Manifest | None = None
    whole: bool = False


def held_out_folder(output: Path) -> Path:
    """The folder of the documents that are held out from a source."""
    return output.with_name(output.name + HELD_OUT)


def file_of_part(output: Path, part: int, num_parts: int) -> Path:
    """The progress file of a part, which is counted from 0."""
    return output / PARTS / f"{part + 1:05d}-of-{num_parts:05d}.json"


def write_progress(output: Path, progress: Progress) -> None:
    """Replace the progress file of a part in one step."""
    path = file_of_part(output, progress.part, progress.parts)
    replace_text(path, progress.model_dump_json() + "\n")


def read_progress(path: Path) -> Progress:
    """The progress in a file; BadInput where it is damaged or of another version."""
    try:
        return Progress.model_validate_json(path.read_bytes())
    except ValidationError as error:
        first = str(error).splitlines()[0]
        raise BadInput(
            f"{path} is not a progress file of this version of bigmix ({first}); remove the folder"
            " and prepare again"
        ) from error


def faults_of_output(output: Path, *, holds_out: bool) -> Sequence[str]:
    """Why nothing can be prepared into a folder, or into the folder of the held-out documents.

    Work that was begun there and can be continued is no fault.
    """
    folders = _folders(output, holds_out=holds_out)
    if _is_begun(output):
        # The other folder may belong to the same work, or be a source of its own.
        has_position = any((output / PARTS).glob("*.json"))
        folders = tuple(f for f in folders[1:] if not (has_position or _has_shards_alone(f)))
    faults = []
    for folder in folders:
        if folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
            what = "holds a prepared source" if (folder / MANIFEST).is_file() else "is not empty"
            faults.append(f"output {folder} already {what}; remove it or give another --output")
    return faults


def _folders(output: Path, *, holds_out: bool) -> tuple[Path, ...]:
    return (output, held_out_folder(output)) if holds_out else (output,)


def _is_begun(output: Path) -> bool:
    """Whether a folder holds only what work that can be continued has left."""
    if not (output / PARTS).is_dir():
        return False
    return all(path.name == PARTS or _is_of_shards(path) for path in output.iterdir())


def _has_shards_alone(folder: Path) -> bool:
    """Whether a folder holds only shards without a manifest, as a command leaves it that was
    killed.
    """
    return folder.is_dir() and all(map(_is_of_shards, folder.iterdir()))


def _is_of_shards(path: Path) -> bool:
    return path.name.startswith((SHARD, TOKENIZER_FOLDER, LENGTHS))


@contextmanager
def locked_part(output: Path, part: int, num_parts: int) -> Iterator[None]:
    """Keep other commands on this machine from a part, which is counted from 0.

    Raises BadInput where another command has locked it.
    """
    with file_of_part(output, part, num_parts).with_suffix(".lock").open("w") as file:
        if not lock_if_supported(file):
            raise BadInput(
                f"part {part + 1}/{num_parts} of {output} is being prepared by another command;"
                " wait for it or stop it"
            )
        yield


def remove_unlisted(folder: Path, listed: Collection[str]) -> None:
    """Remove shards that a killed command had begun, or finished and not yet recorded."""
    for path in folder.glob(f"{SHARD}*.tar*"):
        if path.name not in listed:
            path.unlink()


def remove_begun(output: Path, *, holds_out: bool) -> None:
    """Remove only what work without a complete shard has left."""
    for folder in _folders(output, holds_out=holds_out):
        is_anothers = folder != output and (folder / PARTS).exists()
        if (folder / MANIFEST).exists() or is_anothers:
            continue
        remove_unlisted(folder, ())
        for name in (PARTS, TOKENIZER_FOLDER):
            shutil.rmtree(folder / name, ignore_errors=True)
        with suppress(OSError):  # it does not exist, or holds other files
            folder.rmdir()


def differing(begun: Mapping[str, str], now: Mapping[str, str]) -> Sequence[str]:
    """The names of the fields in which two identities differ."""
    return [name for name in dict.fromkeys([*begun, *now]) if begun.get(name) != now.get(name)]


def faults_of_identity(begun: Progress, now: Progress, output: Path) -> Sequence[str]:
    """Each setting that differs from the one with which the work in a folder was begun."""
    return [
        f"{name} is {now.identity.get(name)}, but {output} was begun with"
        f" {begun.identity.get(name)}; set it back, or remove the folder and prepare again"
        for name in differing(begun.identity, now.identity)
    ]


@dataclass(frozen=True, kw_only=True, slots=True)
class Merged:
    """A complete source, the source of the held-out documents (None where there are none), and
    where the first document was dropped for each reason.
    """

    manifest: Manifest
    held_out: Manifest | None
    first_dropped: dict[str, str]


def merge(output: Path) -> Merged:
    """Make one source of the parts in a folder, with the documents in the order of the parts.

    Raises BadInput where a part is missing or incomplete, where parts do not belong together, or
    where no document is left.
    """
    parts = _complete_parts(output)
    faults = [*_faults_of_identity(output, parts), *_faults_of_files(output, parts)]
    if faults:
        raise BadInput(*faults)
    source = _joined([part.source for part in parts])
    if source.documents == 0:
        raise nothing_left(source)
    held_out = _joined([part.held_out for part in parts if part.held_out is not None] or [source])
    is_held_out = parts[0].held_out is not None and held_out.documents > 0
    if is_held_out:
        folder = held_out_folder(output)
        shutil.copytree(output / TOKENIZER_FOLDER, folder / TOKENIZER_FOLDER, dirs_exist_ok=True)
        held_out = _written(folder, held_out)
    first_dropped: dict[str, str] = {}
    for part in reversed(parts):
        first_dropped |= part.first_dropped
    source = _written(output, source)
    shutil.rmtree(output / PARTS)
    return Merged(
        manifest=source,
        held_out=held_out if is_held_out else None,
        first_dropped=first_dropped,
    )


def nothing_left(manifest: Manifest) -> BadInput:
    """The fault of a source without a document."""
    reasons = ", ".join(f"{n} {r}" for r, n in Counter(manifest.dropped).most_common())
    return BadInput(
        f"none of {manifest.read} documents is left ({reasons}); nothing was written, see"
        " docs/data-formats.md"
    )


def _written(folder: Path, manifest: Manifest) -> Manifest:
    remove_unlisted(folder, [entry.file for entry in manifest.shards])
    manifest = with_lengths(folder, manifest)
    write_manifest(folder, manifest)
    return manifest


def _complete_parts(output: Path) -> Sequence[Progress]:
    """All parts in order; raises BadInput where one is missing or incomplete."""
    faults = list(faults_of_output(output, holds_out=False))
    found = [read_progress(path) for path in sorted((output / PARTS).glob("*-of-*.json"))]
    if faults or not found:
        raise BadInput(
            *faults or [f"{output} holds no parts; make them with `bigmix prepare --part 1/N`"]
        )
    counts = sorted({each.parts for each in found})
    if len(counts) > 1:
        raise BadInput(
            f"{output} holds parts of {' and of '.join(map(str, counts))}; remove those that do not"
            f" belong there: {output / PARTS}/*-of-NNNNN.json"
        )
    by_part = {each.part: each for each in found}
    for part in range(counts[0]):
        if part not in by_part:
            faults.append(
                f"part {part + 1}/{counts[0]} is missing: {file_of_part(output, part, counts[0])};"
                " prepare it"
            )
        elif not by_part[part].whole:
            faults.append(
                f"part {part + 1}/{counts[0]} is not complete; run its command again, it continues"
            )
    if faults:
        raise BadInput(*faults)
    return [by_part[part] for part in range(counts[0])]


def _faults_of_identity(output: Path, parts: Sequence[Progress]) -> Sequence[str]:
    first = parts[0]
    return [
        f"{output}: {name} of part 1/{first.parts} is {first.identity.get(name)}, that of part"
        f" {part.part + 1}/{first.parts} is {part.identity.get(name)}; remove the file of one of"
        " the two and prepare that part like the other"
        for part in parts[1:]
        for name in differing(first.identity, part.identity)
    ]


def _faults_of_files(output: Path, parts: Sequence[Progress]) -> Sequence[str]:
    faults: list[str] = []
    for part in parts:
        faults += faults_of_shards(str(output), part.source, checksum_bytes=0)
        if part.held_out is not None and part.held_out.documents:
            folder = held_out_folder(output)
            faults += faults_of_shards(str(folder), part.held_out, checksum_bytes=0)
    return faults


def _joined(parts: Sequence[Manifest]) -> Manifest:
    """One manifest with the sums of all counts and the shards of all parts in order."""
    dropped: Counter[str] = Counter()
    statistics = Statistics()
    for part in parts:
        dropped.update(part.dropped)
        statistics += part.statistics or Statistics()
    names = ("read", "documents", "tokens", "loss_tokens", "loss_bytes")
    sums = {name: sum(getattr(part, name) for part in parts) for name in names}
    shards = ShardTable.of([entry for part in parts for entry in part.shards])
    others = {"dropped": dict(sorted(dropped.items())), "statistics": statistics, "shards": shards}
    return parts[0].model_copy(update=sums | others)
