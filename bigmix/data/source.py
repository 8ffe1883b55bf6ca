"""The path of a prepared source goes in, wherever it lies; its manifest and its rows come out.

A source on local disk is mapped. The shards of others are fetched whole into a cache that the ranks of a machine share,
in the order in which they will be needed, or read in ranges where a machine needs little of each.
"""

import io
import weakref
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np

from bigmix.data.cache import Lease, ShardCache
from bigmix.data.fetch_ahead import Ahead, FetchAhead, Needed
from bigmix.data.location import MANIFEST, Location, location_of, shown
from bigmix.data.manifest import Manifest, parse_manifest, read_manifest
from bigmix.data.retry import Changed, Retry
from bigmix.data.shards import ByteSource, Shard, mapped
from bigmix.data.storage import read_file, read_range
from bigmix.data.stream import Packer, Stream
from bigmix.errors import BadInput, BigmixError
from bigmix.files import sha256_of
from bigmix.records import Ints

TOKENIZER = "tokenizer"
_TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "tokenizer.model",
    "chat_template.jinja",
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Source:
    """A prepared source: where it is, and what its manifest says of the shards that are chosen."""

    location: Location
    manifest: Manifest
    documents: (
        Sequence[slice] | None
    )  # where the documents of each chosen shard are among all; None: all are chosen


@dataclass(frozen=True, kw_only=True, slots=True)
class Reading:
    """How remote shards are read: through a cache, whole unless `ranges` is set for texts."""

    folder: Path
    max_bytes: int
    retry: Retry
    ahead: Ahead
    ranges: bool = False


def read_source(path: str, retry: Retry | None = None) -> Source:
    """Read the manifest of a prepared source, local or remote.

    Raises BadInput where there is none, where it is not whole, or where it does not list a shard that was asked for.
    """
    location = location_of(path)
    url = location.url(MANIFEST)
    if location.is_local:
        manifest = read_manifest(str(Path(url).parent))
    else:
        manifest = parse_manifest(read_file(url, retry=retry), shown(url))
    if location.names is None:
        return Source(location=location, manifest=manifest, documents=None)
    places = {entry.file: index for index, entry in enumerate(manifest.shards)}
    missing = [name for name in location.names if name not in places]
    if missing:
        raise BadInput(
            f"{shown(path)} names {len(missing)} shards that its manifest does not list, the first is {missing[0]}; "
            "correct the pattern"
        )
    before = np.concatenate([[0], np.cumsum(manifest.shards.column("documents"))]).tolist()
    documents = [slice(*before[places[name] : places[name] + 2]) for name in location.names]
    chosen = _selected(manifest, location.names)
    return Source(location=location, manifest=chosen, documents=documents)


def _selected(manifest: Manifest, names: Sequence[str]) -> Manifest:
    """The manifest of some of the shards; the bytes behind the loss are taken to be spread evenly over its tokens."""
    shards = manifest.shards.select(names)
    sums = {unit: int(shards.column(unit).sum()) for unit in ("documents", "tokens", "loss_tokens")}
    loss_bytes = round(manifest.loss_bytes * sums["loss_tokens"] / max(1, manifest.loss_tokens))
    return manifest.model_copy(update={**sums, "shards": shards, "loss_bytes": loss_bytes})


class Depot:
    """Opens the shards of sources for one process; what is remote comes through one cache."""

    def __init__(self, reading: Reading) -> None:
        self._reading = reading
        self._cache: ShardCache | None = None
        self._ahead: FetchAhead | None = None

    @property
    def wait_s(self) -> float:
        """Seconds spent waiting for files that were not there in time."""
        return self._ahead.wait_s if self._ahead is not None else 0.0

    def stream(self, name: str, source: Source, packer: Packer, *, seed: int) -> Stream:
        """The rows of a source.

        Raises BigmixError where its file of lengths is not the one that its manifest lists.
        """
        open_shard = partial(self._open, source)
        return Stream(name, source.manifest, open_shard, packer, lengths=self._lengths(source), seed=seed)  # fmt: skip

    def fetch_ahead(self, order: Iterable[tuple[Source, int]]) -> None:
        """From now on fetch shards in this order, remote ones alone, before they are asked for."""
        self.close()
        needed = (_needed(source, index) for source, index in order if self._is_fetched(source))
        self._ahead = FetchAhead(self._opened_cache(), needed, self._reading.ahead)

    def close(self) -> None:
        """Stop fetching ahead."""
        if self._ahead is not None:
            self._ahead.close()
            self._ahead = None

    def tokenizer_folder(self, source: Source) -> Path:
        """The folder of the tokenizer that made a source; that of a remote one is copied beside the cache."""
        location = source.location
        if location.is_local:
            return Path(location.url(MANIFEST)).parent / TOKENIZER
        folder = self._reading.folder / f"tokenizer-{source.manifest.tokenizer.fingerprint[:32]}"
        folder.mkdir(parents=True, exist_ok=True)
        for name in _TOKENIZER_FILES:
            try:
                content = read_file(location.url(f"{TOKENIZER}/{name}"), retry=self._reading.retry)
            except BadInput:
                continue  # a tokenizer has some of these files
            (folder / name).write_bytes(content)
        return folder

    def _is_fetched(self, source: Source) -> bool:
        """Whether shards of a source go through the cache."""
        ranges = self._reading.ranges and source.manifest.kind == "text"
        return not source.location.is_local and not ranges

    def _open(self, source: Source, index: int) -> Shard:
        entry = source.manifest.shards[index]
        url = source.location.url(entry.file)
        if source.location.is_local:
            where = mapped(Path(url), entry.bytes)
        elif self._is_fetched(source):
            where = _leased(self._lease(source, index), url, entry.bytes)
        else:
            where = ByteSource(name=shown(url), read=partial(_read_range, url, self._reading.retry), mapping=None)  # fmt: skip
        return Shard(where, entry, source.manifest.dtype)

    def _lease(self, source: Source, index: int) -> Lease:
        needed = _needed(source, index)
        if self._ahead is not None:
            return self._ahead.take(needed)
        return self._opened_cache().get(needed.url, size=needed.size, sha256=needed.sha256)

    def _opened_cache(self) -> ShardCache:
        if self._cache is None:
            reading = self._reading
            self._cache = ShardCache(reading.folder, reading.max_bytes, reading.retry)
        return self._cache

    def _lengths(self, source: Source) -> Ints | None:
        manifest = source.manifest
        if manifest.lengths is None:
            return None
        url = source.location.url(manifest.lengths.file)
        if source.location.is_local:
            lengths = _load_lengths(Path(url), manifest)
        else:
            entry = manifest.lengths
            with self._opened_cache().get(url, size=entry.bytes, sha256=entry.sha256) as path:
                lengths = np.load(io.BytesIO(path.read_bytes()))
        if source.documents is None:
            return lengths
        return np.concatenate([lengths[part] for part in source.documents])


def needed_in_order(
    places: Iterable[Iterable[tuple[str, int]]], sources: Mapping[str, Source], kept: int
) -> Iterator[tuple[Source, int]]:
    """The shards that rows come from, in the order of the rows, each once until `kept` others of its source came since."""
    recent: dict[str, dict[int, None]] = {name: {} for name in sources}
    for rows in places:
        for name, shard in rows:
            seen = recent[name]
            if shard not in seen:
                yield sources[name], shard
            seen.pop(shard, None)
            seen[shard] = None
            if len(seen) > kept:
                del seen[next(iter(seen))]


def _needed(source: Source, index: int) -> Needed:
    entry = source.manifest.shards[index]
    return Needed(url=source.location.url(entry.file), size=entry.bytes, sha256=entry.sha256)


def _leased(lease: Lease, url: str, size: int) -> ByteSource:
    """A file of the cache, held for as long as somebody reads it."""
    found = mapped(lease.path, size)
    where = ByteSource(name=shown(url), read=found.read, mapping=found.mapping)
    weakref.finalize(where, lease.close)
    return where


def _read_range(url: str, retry: Retry, start: int, stop: int) -> "np.ndarray[tuple[int], np.dtype[np.uint8]]":  # fmt: skip
    return np.frombuffer(read_range(url, start, stop, retry=retry), np.uint8)


def _load_lengths(path: Path, manifest: Manifest) -> Ints:
    assert manifest.lengths is not None
    try:
        if path.stat().st_size != manifest.lengths.bytes:
            raise Changed(f"it has {path.stat().st_size} bytes, the manifest says {manifest.lengths.bytes}")  # fmt: skip
        if sha256_of(path) != manifest.lengths.sha256:
            raise Changed("its sha256 is not the manifest's: its content has changed")
        lengths: Ints = np.load(path, mmap_mode="r")
    except (OSError, ValueError, Changed) as error:
        raise BigmixError(
            f"{path} cannot be used ({error}); restore the file or prepare the source again"
        ) from error
    return lengths
