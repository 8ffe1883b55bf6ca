"""The parts in a folder go in, one prepared source comes out: its manifest is written last."""

import shutil
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from bigmix.commands.prepare.progress import (
    PARTS,
    TOKENIZER_FOLDER,
    Progress,
    differing,
    faults_of_output,
    file_of_part,
    held_out_folder,
    read_progress,
    remove_unlisted,
)
from bigmix.data.shards.manifest import Manifest, ShardTable, faults_of_shards, write_manifest
from bigmix.data.shards.shard import with_lengths
from bigmix.data.statistics import Statistics
from bigmix.errors import BadInput


@dataclass(frozen=True, kw_only=True, slots=True)
class Merged:
    """The whole source, what is held out from it (None where nothing is), and where the first documents were dropped."""

    manifest: Manifest
    held_out: Manifest | None
    first_dropped: dict[str, str]


def merge(output: Path) -> Merged:
    """Make one source of the parts in a folder, their documents in the order of the parts.

    Raises BadInput where a part is missing or not whole, where parts do not go together, or where no document is left.
    """
    parts = _parts(output)
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
    """What to say of a source without a document."""
    reasons = ", ".join(f"{n} {r}" for r, n in Counter(manifest.dropped).most_common())
    return BadInput(
        f"none of {manifest.read} documents is left ({reasons}); nothing was written, see docs/data-formats.md"
    )


def _written(folder: Path, manifest: Manifest) -> Manifest:
    remove_unlisted(folder, [entry.file for entry in manifest.shards])
    manifest = with_lengths(folder, manifest)
    write_manifest(folder, manifest)
    return manifest


def _parts(output: Path) -> Sequence[Progress]:
    """All parts in order; BadInput where one is not there or not whole."""
    faults = list(faults_of_output(output, holds_out=False))
    found = [read_progress(path) for path in sorted((output / PARTS).glob("*-of-*.json"))]
    if faults or not found:
        raise BadInput(
            *faults or [f"{output} holds no parts; make them with `bigmix prepare --part 1/N`"]
        )
    counts = sorted({each.parts for each in found})
    if len(counts) > 1:
        raise BadInput(
            f"{output} holds parts of {' and of '.join(map(str, counts))}; remove those that do not belong: "
            f"{output / PARTS}/*-of-NNNNN.json"
        )
    by_part = {each.part: each for each in found}
    for part in range(counts[0]):
        if part not in by_part:
            faults.append(
                f"part {part + 1}/{counts[0]} is missing: {file_of_part(output, part, counts[0])}; make it"
            )
        elif not by_part[part].whole:
            faults.append(
                f"part {part + 1}/{counts[0]} is not whole yet; run its command again, it goes on"
            )
    if faults:
        raise BadInput(*faults)
    return [by_part[part] for part in range(counts[0])]


def _faults_of_identity(output: Path, parts: Sequence[Progress]) -> Sequence[str]:
    first = parts[0]
    return [
        f"{output}: {name} of part 1/{first.parts} is {first.identity.get(name)}, that of part {part.part + 1}/"
        f"{first.parts} is {part.identity.get(name)}; remove the file of one of them and prepare it like the other"
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
    """The sums of all counts, and the shards one after the other."""
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
