"""What a recipe says of its sources goes in; each of them comes out opened, or what is wrong with it."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from bigmix.data.quarantine import BadShard
from bigmix.data.shards.location import MANIFEST
from bigmix.data.shards.manifest import Manifest, faults_of_shards
from bigmix.data.shards.prefetch import Ahead
from bigmix.data.shards.retry import Retry
from bigmix.data.source import Depot, Reading, Source, read_source
from bigmix.data.stream import Packer, Stream
from bigmix.errors import BadInput, BigmixError
from bigmix.recipe import HeldOut, Recipe

RANGES_FROM = 64  # machines: each then needs fewer than two of three blocks of a shard
CHECKSUM_BYTES = 1 << 30  # shards beyond this are checked when their first row is read


def retry_of(recipe: Recipe) -> Retry:
    """How the files of a recipe's sources are tried again."""
    return Retry(tries=recipe.cache.tries, timeout_s=recipe.cache.timeout_s)


def ahead_of(recipe: Recipe) -> Ahead:
    """How far ahead of need they are fetched."""
    return Ahead(files=recipe.cache.ahead_files, bytes=recipe.cache.ahead_bytes)


def reading_of(recipe: Recipe, machines: int) -> Reading:
    """How shards that lie elsewhere are read."""
    cache = recipe.cache
    return Reading(
        folder=Path(cache.folder).expanduser(),
        max_bytes=cache.size,
        retry=retry_of(recipe),
        ahead=ahead_of(recipe),
        ranges=cache.read == "ranges" or (cache.read == "auto" and machines >= RANGES_FROM),
    )


def packer_of(recipe: Recipe, name: str, row_tokens: int) -> Packer:
    """What decides the rows of a source or a held-out set."""
    packed = recipe.sources.get(name) or recipe.held_out[name]
    if isinstance(packed, str):
        packed = HeldOut(path=packed)
    return Packer(
        row_tokens=row_tokens,
        long_documents=packed.long_documents,
        whole_below=packed.whole_below,
        pad_to_multiple=recipe.pad_to_multiple,
    )


def held_out_streams(
    recipe: Recipe, depot: Depot, sources: Mapping[str, Source]
) -> Mapping[str, Stream]:
    """The held-out sets of a recipe, opened; raises BadInput where a shard must be opened for it and is bad."""
    longest = max(length for _, length in recipe.lengths)
    try:
        return {
            name: depot.stream(
                name, sources[path], packer_of(recipe, name, longest), seed=recipe.seed
            )
            for name, path in recipe.held_out_paths.items()
        }
    except BadShard as bad:
        raise BadInput(f"held_out of {bad.source}: {bad.reason}") from bad


def collect(faults: list[str], check: Any, *arguments: Any) -> Any:
    """The result of a check, or None after its faults are added to the list."""
    try:
        return check(*arguments)
    except BadInput as error:
        faults += error.faults
        return None


def opened_source(key: str, path: str, retry: Retry) -> Source:
    """A source that has documents; raises BadInput, with the key of the recipe, where there is none."""
    try:
        source = read_source(path, retry)
    except BigmixError as error:
        raise BadInput(*(f"{key}: {fault}" for fault in str(error).splitlines())) from error
    if not source.manifest.documents:
        raise BadInput(f"{key}: {path} holds no document; prepare it from an input that has some")
    return source


def damaged_shards(source: Source, verify: bool) -> Sequence[str]:
    """What is wrong with shards of a local source; those of others are looked at when they are fetched."""
    if not source.location.is_local:
        return ()
    folder = Path(source.location.url(MANIFEST)).parent
    checksum_bytes = CHECKSUM_BYTES if verify else 0
    return faults_of_shards(str(folder), source.manifest, checksum_bytes=checksum_bytes)


def tokenizer_faults(manifests: Mapping[str, Manifest]) -> Iterator[str]:
    """Sources, by their paths, that were prepared with another tokenizer than the first."""
    by_fingerprint: dict[str, str] = {}
    for path, manifest in manifests.items():
        by_fingerprint.setdefault(manifest.tokenizer.fingerprint, path)
    if len(by_fingerprint) > 1:
        first, *others = by_fingerprint.values()
        yield (
            f"{', '.join(others)}: prepared with another tokenizer than {first}; all sources and held-out sets of a "
            "run need the same one, prepare them again with one --tokenizer"
        )


def faults_of_empty(stream: Stream) -> Iterator[str]:
    """What is wrong with a stream without rows."""
    if not stream.rows_per_epoch:
        yield (
            f"{stream.name}: none of its {stream.manifest.documents} documents fits a row of this sequence_length; "
            "raise sequence_length, or set long_documents: truncate"
        )
