"""Prepared sources, local or remote: their manifests, and a store that opens their shards.

A source on local disk is mapped into memory. The shards of other sources are fetched whole into a
cache that the ranks of a machine share, in the order in which they will be needed, or read in
ranges where a machine needs little of each.
"""

import hashlib
import shutil
import tempfile
import weakref
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np

from bigmix.data.packing import LAYOUTS, PackingOptions
from bigmix.data.records import RowIds
from bigmix.data.shards.cache import CacheFault, Lease, ShardCache
from bigmix.data.shards.location import MANIFEST, Location, location_of, shown
from bigmix.data.shards.manifest import Manifest, parse_manifest, read_manifest
from bigmix.data.shards.prefetch import Ahead, FetchAhead, Needed
from bigmix.data.shards.retry import Changed, Retry, Stopped, Watch
from bigmix.data.shards.shard import Bytes, ByteSource, Shard, Unreadable, mapped
from bigmix.data.shards.storage import read_file, read_range
from bigmix.data.stream import OPEN_SHARDS, Stream
from bigmix.errors import BadInput, BigmixError
from bigmix.files import sha256_of
from bigmix.types import Ints

TOKENIZER = "tokenizer"
_TOKENIZER_FILE = "tokenizer.json"
_TOKENIZER_FILES_TOO = (  # a tokenizer need not have all of them
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
)
_PIPE_TRIES = 2  # a command's failure does not say whether its file is missing
_MANIFEST_TRIES = 3  # for a manifest that was read before


@dataclass(frozen=True, kw_only=True, slots=True)
class PreparedSource:
    """A prepared source: where it is, and what its manifest says of the chosen shards.

    `documents` says where the documents of each chosen shard are among all; None where all shards
    are chosen.
    """

    location: Location
    manifest: Manifest
    documents: Sequence[slice] | None

    @property
    def content(self) -> str:
        """A checksum that is the same for the same shards in the same order, wherever they are."""
        digest = hashlib.sha256()
        for shard in self.manifest.shards:
            digest.update(bytes.fromhex(shard.sha256))
        return digest.hexdigest()[:32]


@dataclass(frozen=True, kw_only=True, slots=True)
class RemoteReadOptions:
    """How remote shards are read: whole, through a cache of `max_bytes` in `folder`; or, with
    `ranges`, block by block where a row is consecutive tokens.
    """

    folder: Path
    max_bytes: int
    retry: Retry
    ahead: Ahead
    ranges: bool = False


def read_source(
    path: str, retry: Retry | None = None, watch: Watch | None = None
) -> PreparedSource:
    """Read the manifest of a prepared source, local or remote.

    Raises BadInput where there is none, where it is not whole, or where it does not list a shard
    that the path names.
    """
    location = location_of(path)
    url = location.url(MANIFEST)
    if location.is_local:
        manifest = read_manifest(str(Path(url).parent))
    else:
        manifest = parse_manifest(read_file(url, retry=retry, watch=watch), shown(url))
    if location.names is None:
        return PreparedSource(location=location, manifest=manifest, documents=None)
    places = {file: index for index, file in enumerate(manifest.shards.files)}
    missing = [name for name in location.names if name not in places]
    if missing:
        raise BadInput(
            f"{shown(path)} names {len(missing)} shards that its manifest does not list, the first"
            f" is {missing[0]}; correct the pattern"
        )
    before = np.concatenate([[0], np.cumsum(manifest.shards.column("documents"))]).tolist()
    documents = [slice(*before[places[name] : places[name] + 2]) for name in location.names]
    chosen = _selected(manifest, location.names)
    return PreparedSource(location=location, manifest=chosen, documents=documents)


def _selected(manifest: Manifest, names: Sequence[str]) -> Manifest:
    """The manifest of some of the shards; the bytes behind the loss are assumed to be spread evenly
    over its tokens.
    """
    shards = manifest.shards.select(names)
    sums = {unit: int(shards.column(unit).sum()) for unit in ("documents", "tokens", "loss_tokens")}
    loss_bytes = round(manifest.loss_bytes * sums["loss_tokens"] / max(1, manifest.loss_tokens))
    return manifest.model_copy(update={**sums, "shards": shards, "loss_bytes": loss_bytes})


class ShardStore:
    """Opens the shards of sources for one process; remote ones come through one cache.

    An opened shard stays in the cache for as long as it is referenced.
    """

    def __init__(self, reading: RemoteReadOptions) -> None:
        self._reading = reading
        self._cache: ShardCache | None = None
        self._ahead: FetchAhead | None = None
        self._watch = Watch()
        self._lengths: dict[Location, Ints | None] = {}

    def stream(
        self, name: str, source: PreparedSource, packing: PackingOptions, *, seed: int
    ) -> Stream:
        """The rows of a source.

        Raises BigmixError where its file of lengths is not the one that its manifest lists.
        """
        if source.location not in self._lengths:
            # Checked once for all streams of a source, which has one for each length of rows.
            self._lengths[source.location] = self._open_lengths(source)
        lengths = self._lengths[source.location]
        open_shard = partial(self.open, source)
        return Stream(name, source.manifest, open_shard, packing, lengths=lengths, seed=seed)

    def fetch_ahead(self, order: Iterable[tuple[PreparedSource, int]]) -> None:
        """From now on fetch shards ahead of need in this order; all must be of sources for which
        `is_fetched` is true.
        """
        self.reopen()
        needed = (_needed(source, index) for source, index in order)
        self._ahead = FetchAhead(self._opened_cache(), needed, self._reading.ahead)

    def close(self) -> None:
        """Stop fetching: a thread that waits for a shard gets Stopped, as does a later call for one
        that is not in the cache.
        """
        self._watch.stop()
        if self._ahead is not None:
            self._ahead.close()

    def reopen(self) -> None:
        """Fetch again after `close`, but nothing ahead until the next `fetch_ahead`."""
        self.close()
        self._ahead, self._watch = None, Watch()

    def tokenizer_folder(self, source: PreparedSource) -> Path:
        """The folder of the tokenizer that made a source; that of a remote source is copied once
        into the folder of the cache.

        The folder does not exist where the source has no tokenizer.
        """
        location, manifest = source.location, source.manifest
        if location.is_local:
            return Path(location.url(MANIFEST)).parent / TOKENIZER
        template = manifest.template.sha256 if manifest.template is not None else ""
        named = f"{location.url(TOKENIZER)} {manifest.tokenizer.fingerprint} {template}"
        folder = (
            self._reading.folder / f"tokenizer-{hashlib.sha256(named.encode()).hexdigest()[:32]}"
        )
        first = None if folder.is_dir() else self._tokenizer_file(location, _TOKENIZER_FILE)
        if first is not None:
            self._opened_cache()
            temporary = Path(tempfile.mkdtemp(dir=self._reading.folder))
            (temporary / _TOKENIZER_FILE).write_bytes(first)
            for name in _TOKENIZER_FILES_TOO:
                content = self._tokenizer_file(location, name)
                if content is not None:
                    (temporary / name).write_bytes(content)
            with suppress(OSError):  # another process was first
                temporary.rename(folder)
            shutil.rmtree(temporary, ignore_errors=True)
        return folder

    def _tokenizer_file(self, location: Location, name: str) -> bytes | None:
        url, retry = location.url(f"{TOKENIZER}/{name}"), self._reading.retry
        try:
            if location.scheme != "pipe":
                return read_file(url, retry=retry)
            return read_file(url, retry=replace(retry, tries=min(retry.tries, _PIPE_TRIES)))
        except BadInput:
            return None
        except BigmixError:
            if location.scheme != "pipe":
                raise
            return None

    def is_fetched(self, source: PreparedSource) -> bool:
        """Whether shards of a source go through the cache."""
        # A command prints a file from its beginning; in ranges it would print it again for each
        # block.
        ranges = (
            self._reading.ranges
            and LAYOUTS[source.manifest.kind].is_contiguous
            and source.location.scheme != "pipe"
        )
        return not source.location.is_local and not ranges

    def open(self, source: PreparedSource, index: int) -> Shard:
        """A shard of a source by its index among the chosen ones.

        Raises Unreadable where the shard is at fault, Stopped where the store was closed,
        CacheFault where the cache is at fault, and another BigmixError where the whole source is.
        """
        entry = source.manifest.shards[index]
        url = source.location.url(entry.file)
        with self._faults_of_shards(source):
            if source.location.is_local:
                where = mapped(Path(url), entry.bytes)
            elif self.is_fetched(source):
                where = self._leased(self._lease(source, index), url, entry.bytes)
            else:
                where = self._in_ranges(source, url)
            return Shard(where, entry, source.manifest.dtype)

    def _in_ranges(self, source: PreparedSource, url: str) -> ByteSource:
        def read(start: int, stop: int) -> Bytes:
            retry, watch = self._reading.retry, self._watch
            with self._faults_of_shards(source):
                part = read_range(url, start, stop, retry=retry, watch=watch)
            return np.frombuffer(part, np.uint8)

        return ByteSource(name=shown(url), read=read, damaged=partial(self._check_source, source))

    def _leased(self, lease: Lease, url: str, size: int) -> ByteSource:
        """A file of the cache, which is kept for as long as it is referenced."""
        found = mapped(lease.path, size)
        cache = self._opened_cache()
        where = replace(found, name=shown(url), damaged=lambda _: cache.discard(lease))
        weakref.finalize(where, lease.close)
        return where

    @contextmanager
    def _faults_of_shards(self, source: PreparedSource) -> Iterator[None]:
        """Raise errors of reading as faults of the shard, unless its source or this machine is at
        fault.
        """
        try:
            yield
        except (Stopped, CacheFault):
            raise
        except BigmixError as error:
            self._check_source(source, str(error))
            raise Unreadable(str(error)) from error

    def _check_source(self, source: PreparedSource, reason: str) -> None:
        """Check that not the whole source is at fault where a shard cannot be read for a reason.

        Raises BigmixError where its manifest cannot be read any more, or lists other shards.
        """
        retry = self._reading.retry
        few = replace(retry, tries=min(retry.tries, _MANIFEST_TRIES))
        place = shown(source.location.url(MANIFEST))
        try:
            now = read_source(source.location.given, few, self._watch)
        except Stopped:
            raise
        except BigmixError as error:
            raise BigmixError(
                f"{reason}\nnot only a shard, the whole source is at fault, since its manifest"
                f" cannot be read either: {error}"
            ) from error
        if now.manifest.shards != source.manifest.shards:
            raise BigmixError(
                f"{reason}\nnot only a shard, the whole source is at fault: {place} lists other"
                " shards than at the start of this run; restore the source, or give another output"
                " and begin again"
            )

    def _lease(self, source: PreparedSource, index: int) -> Lease:
        needed = _needed(source, index)
        if self._ahead is not None:
            return self._ahead.take(needed)
        return self._opened_cache().get(needed.url, size=needed.size, sha256=needed.sha256)

    def _opened_cache(self) -> ShardCache:
        if self._cache is None:
            reading = self._reading
            self._cache = ShardCache(reading.folder, reading.max_bytes, reading.retry)
        return self._cache

    def _open_lengths(self, source: PreparedSource) -> Ints | None:
        manifest = source.manifest
        if manifest.lengths is None:
            return None
        url = source.location.url(manifest.lengths.file)
        if source.location.is_local:
            lengths = _load_lengths(Path(url), manifest)
        else:
            entry = manifest.lengths
            lease = self._opened_cache().get(url, size=entry.bytes, sha256=entry.sha256)
            lengths = np.load(lease.path, mmap_mode="r")
            weakref.finalize(lengths, lease.close)
        if source.documents is None:
            return lengths
        return np.concatenate([lengths[part] for part in source.documents])


def needed_in_order(
    stages: Iterable[Iterable[RowIds]],
    sources: Mapping[str, PreparedSource],
    num_shards: Mapping[str, int],
) -> Iterator[tuple[PreparedSource, int]]:
    """The shards of `sources` in the order in which streams open them.

    `stages` are the rows that are read together, stage by stage. Each stage has streams of its own;
    a stream keeps the OPEN_SHARDS shards open that it used last. `num_shards` is the number of
    shards of each source that have rows to read.
    """
    for batches in stages:
        held: dict[str, dict[int, None]] = {name: {} for name in sources}
        for row_ids in batches:
            for source, shard, _ in row_ids.by_shard():
                name = row_ids.names[source]
                if name in held and _is_opened(shard, held[name]):
                    yield sources[name], shard
            # Else the rows of the rest of the run would be searched for a shard that never comes.
            if all(len(shards) >= num_shards[name] for name, shards in held.items()):
                break


def _is_opened(shard: int, held: dict[int, None]) -> bool:
    """Whether a stream that keeps these shards open, the one used last at the end, must open this
    one; updates `held`.
    """
    is_opened = shard not in held
    held.pop(shard, None)
    held[shard] = None
    if len(held) > OPEN_SHARDS:
        del held[next(iter(held))]
    return is_opened


def bytes_in_use(sources: Iterable[PreparedSource], ahead: Ahead) -> int:
    """The most bytes of a cache that streams of these sources keep in use: their open shards, one
    more for each source, and the shards fetched ahead.
    """
    total, largest = 0, 0
    for source in sources:
        sizes = np.sort(source.manifest.shards.column("bytes"))[::-1]
        total += int(sizes[: OPEN_SHARDS + 1].sum())
        largest = max(largest, int(sizes[0]))
        lengths = source.manifest.lengths
        total += lengths.bytes if lengths is not None else 0
    return total + max(largest, min(ahead.bytes, ahead.files * largest))


def _needed(source: PreparedSource, index: int) -> Needed:
    entry = source.manifest.shards[index]
    return Needed(url=source.location.url(entry.file), size=entry.bytes, sha256=entry.sha256)


def _load_lengths(path: Path, manifest: Manifest) -> Ints:
    assert manifest.lengths is not None
    try:
        if path.stat().st_size != manifest.lengths.bytes:
            raise Changed(
                f"it has {path.stat().st_size} bytes, the manifest says {manifest.lengths.bytes}"
            )
        if sha256_of(path) != manifest.lengths.sha256:
            raise Changed("its sha256 is not the manifest's: its content has changed")
        lengths: Ints = np.load(path, mmap_mode="r")
    except (OSError, ValueError, Changed) as error:
        raise BigmixError(
            f"{path} cannot be used ({error}); restore the file or prepare the source again"
        ) from error
    return lengths
