"""Opens and checks the sources that a recipe names, for a run and for an evaluation alike."""

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bigmix.data.packing import PackingOptions
from bigmix.data.quarantine import BadShard
from bigmix.data.shards.location import MANIFEST
from bigmix.data.shards.manifest import faults_of_shards
from bigmix.data.shards.prefetch import Ahead
from bigmix.data.shards.retry import Retry
from bigmix.data.source import PreparedSource, RemoteReadOptions, ShardStore, read_source
from bigmix.data.stream import Stream
from bigmix.errors import BadInput, BigmixError
from bigmix.recipe import HeldOut, Recipe

RANGES_FROM = 64  # machines: each then needs fewer than two of three blocks of a shard
CHECKSUM_BYTES = 1 << 30  # shards beyond this are checked when their first row is read


@dataclass(frozen=True, kw_only=True, slots=True)
class OpenedSources:
    """The sources that could be opened, by path; what is wrong, and what the user should know."""

    sources: Mapping[str, PreparedSource]
    faults: Sequence[str]
    notes: Sequence[str]


def open_sources(
    paths: Mapping[str, str], retry: Retry, *, verify: bool, replaceable: Collection[str] = ()
) -> OpenedSources:
    """Open the sources at these paths, each under the key of the recipe that messages name.

    The shards of local sources are looked at; `verify` also reads the first GiB of each source
    through. Damaged shards of a source whose key is `replaceable` are a note as long as one of its
    shards is whole; of all others they are faults.
    """
    sources: dict[str, PreparedSource] = {}
    faults: list[str] = []
    notes: list[str] = []
    for key, path in paths.items():
        source = collect(faults, opened_source, key, path, retry)
        if source is None:
            continue
        sources[path] = source
        damaged = damaged_shards(source, verify)
        if key in replaceable and 0 < len(damaged) < len(source.manifest.shards):
            notes.append(
                f"{key}: {len(damaged)} of {len(source.manifest.shards)} shards are damaged; where"
                f" their rows come up, rows of the others are trained; the first is {damaged[0]}"
            )
        else:
            faults += [f"{key}: {fault}" for fault in damaged]
    return OpenedSources(sources=sources, faults=faults, notes=notes)


def collect(faults: list[str], check: Any, *arguments: Any) -> Any:
    """The result of a check, or None after its faults are added to the list."""
    try:
        return check(*arguments)
    except BadInput as error:
        faults += error.faults
        return None


def opened_source(key: str, path: str, retry: Retry) -> PreparedSource:
    """The source at a path, by its manifest alone.

    Raises BadInput, with the key of the recipe, where there is none or it holds no document.
    """
    try:
        source = read_source(path, retry)
    except BigmixError as error:
        raise BadInput(*(f"{key}: {fault}" for fault in str(error).splitlines())) from error
    if not source.manifest.documents:
        raise BadInput(f"{key}: {path} holds no document; prepare it from an input that has some")
    return source


def damaged_shards(source: PreparedSource, verify: bool) -> Sequence[str]:
    """What is wrong with the shards of a local source; those of others are checked when fetched."""
    if not source.location.is_local:
        return ()
    folder = Path(source.location.url(MANIFEST)).parent
    checksum_bytes = CHECKSUM_BYTES if verify else 0
    return faults_of_shards(str(folder), source.manifest, checksum_bytes=checksum_bytes)


def tokenizer_faults(sources: Mapping[str, PreparedSource]) -> Iterator[str]:
    """Sources, by path, that were prepared with another tokenizer than the first."""
    by_fingerprint: dict[str, str] = {}
    for path, source in sources.items():
        by_fingerprint.setdefault(source.manifest.tokenizer.fingerprint, path)
    if len(by_fingerprint) > 1:
        first, *others = by_fingerprint.values()
        yield (
            f"{', '.join(others)}: prepared with another tokenizer than {first}; all sources and"
            " held-out sets of a run need the same one, prepare them again with one --tokenizer"
        )


def open_streams(
    recipe: Recipe,
    shard_store: ShardStore,
    sources: Mapping[str, PreparedSource],
    paths: Mapping[str, str],
    row_tokens: int,
) -> dict[str, Stream]:
    """The rows of some sources and held-out sets, whose `paths` are given by name.

    Raises BadShard where a shard must be read to count its rows and cannot be.
    """
    return {
        name: shard_store.stream(
            name, sources[path], packing_options_of(recipe, name, row_tokens), seed=recipe.seed
        )
        for name, path in paths.items()
    }


def held_out_streams(
    recipe: Recipe, shard_store: ShardStore, sources: Mapping[str, PreparedSource]
) -> Mapping[str, Stream]:
    """The rows of the held-out sets of a recipe, as long as its longest.

    Raises BadInput where a shard must be read to count its rows and cannot be.
    """
    longest = max(length for _, length in recipe.lengths)
    try:
        return open_streams(recipe, shard_store, sources, recipe.held_out_paths, longest)
    except BadShard as bad:
        raise BadInput(f"held_out of {bad.source}: {bad.reason}") from bad


def faults_of_empty(stream: Stream) -> Iterator[str]:
    """What is wrong with a stream without rows."""
    if not stream.rows_per_epoch:
        yield (
            f"{stream.name}: none of its {stream.manifest.documents} documents fits a row of this"
            " sequence_length; raise sequence_length, or set long_documents: truncate"
        )


def packing_options_of(recipe: Recipe, name: str, row_tokens: int) -> PackingOptions:
    """How the documents of a source or a held-out set become rows."""
    packed = recipe.sources.get(name) or recipe.held_out[name]
    if isinstance(packed, str):
        packed = HeldOut(path=packed)
    return PackingOptions(
        row_tokens=row_tokens,
        long_documents=packed.long_documents,
        whole_below=packed.whole_below,
        pad_to_multiple=recipe.pad_to_multiple,
    )


def read_options_of(recipe: Recipe, machines: int) -> RemoteReadOptions:
    """How remote shards are read by a run on this many machines."""
    cache = recipe.cache
    return RemoteReadOptions(
        folder=Path(cache.folder).expanduser(),
        max_bytes=cache.size,
        retry=retry_of(recipe),
        ahead=ahead_of(recipe),
        ranges=cache.read == "ranges" or (cache.read == "auto" and machines >= RANGES_FROM),
    )


def retry_of(recipe: Recipe) -> Retry:
    """How often the files of a recipe's sources are tried."""
    return Retry(tries=recipe.cache.tries, timeout_s=recipe.cache.timeout_s)


def ahead_of(recipe: Recipe) -> Ahead:
    """How far ahead of need they are fetched."""
    return Ahead(files=recipe.cache.ahead_files, bytes=recipe.cache.ahead_bytes)
