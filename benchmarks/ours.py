"""What the benchmarks of the loader use of bigmix."""

from collections.abc import Callable, Iterator, Mapping
from itertools import chain, count, islice
from pathlib import Path

import numpy as np
from corpus import BATCH_ROWS, ROW_TOKENS, SHARES, Batch, Corpus, Source
from reader import Reader

from bigmix.data.loader import Loader, step_batch
from bigmix.data.mixture import Mixture
from bigmix.data.packing import PackingOptions
from bigmix.data.records import RankRows, RowIds, StepBatch
from bigmix.data.run_plan import RunPlan, SequenceLengthStage
from bigmix.data.shards.manifest import (
    Manifest,
    ShardEntry,
    ShardTable,
    TemplateEntry,
    TokenizerEntry,
    write_manifest,
)
from bigmix.data.shards.prefetch import Ahead
from bigmix.data.shards.retry import Retry
from bigmix.data.shards.shard import Shard, ShardWriter, with_lengths
from bigmix.data.source import RemoteReadOptions, ShardStore, read_source
from bigmix.data.stream import Stream

ROWS_PER_STEP = 64
SHARD_TOKENS = 64_000_000  # the default of `bigmix prepare`
BATCHES_PER_STEP = ROWS_PER_STEP // BATCH_ROWS
LAST_STEP = 1 << 40
TOKENIZER = TokenizerEntry(
    name="random", fingerprint="0" * 64, vocab_size=50_000, bos_id=None, eos_id=0
)
TEMPLATE = TemplateEntry(name="plain", sha256="0" * 64)


def write(corpus: Corpus, folder: Path) -> None:
    """The corpus as prepared sources, one folder each."""
    for name, source in corpus.sources.items():
        (folder / name).mkdir(parents=True, exist_ok=True)
        shards = [
            _write_shard(source, part, folder / name / f"shard-{index:06d}.tar")
            for index, part in enumerate(source.shards(SHARD_TOKENS, at_least=1))
        ]
        manifest = _manifest(name, ShardTable.of(shards))
        write_manifest(folder / name, with_lengths(folder / name, manifest))


def _write_shard(source: Source, documents: range, path: Path) -> ShardEntry:
    writer = ShardWriter(path, "uint16", masked=source.mask_N is not None)
    for index in documents:
        document = source[index]
        mask = None if document.mask_T is None else document.mask_T.astype(np.bool_)
        writer.add(document.ids_T, mask)
    return writer.close()


def _manifest(name: str, shards: ShardTable) -> Manifest:
    documents = sum(shard.documents for shard in shards)
    loss_tokens = sum(shard.loss_tokens for shard in shards)
    return Manifest(
        kind="chat" if name == "chat" else "text",
        dtype="uint16",
        tokenizer=TOKENIZER,
        template=TEMPLATE if name == "chat" else None,
        read=documents,
        dropped={},
        documents=documents,
        tokens=sum(shard.tokens for shard in shards),
        loss_tokens=loss_tokens,
        loss_bytes=loss_tokens,
        shards=shards,
    )


def write_simulated(folder: Path, num_shards: int) -> None:
    """The manifest of a text source with shards of about 64M tokens each, which do not exist."""
    tokens, documents = 64_000_000 - np.arange(num_shards) % 1000, 70_000
    columns = {
        "file": [f"shard-{index:06d}.tar" for index in range(num_shards)],
        "sha256": ["0" * 64] * num_shards,
        "blocks_check": ["0" * 16] * num_shards,
        "bytes": 2 * tokens,
        "documents": np.full(num_shards, documents),
        "tokens": tokens,
        "loss_tokens": tokens - documents,
        "blocks": np.full(num_shards, 500),
        "blocks_at": 2 * tokens - 40_000,
    }
    write_manifest(folder, _manifest("text", ShardTable(columns)))


def make_stream(name: str, folder: Path) -> Stream:
    """The rows of one source."""
    reading = RemoteReadOptions(folder=folder / "cache", max_bytes=0, retry=Retry(), ahead=Ahead())
    source = read_source(str(folder))
    return ShardStore(reading).stream(name, source, PackingOptions(row_tokens=ROW_TOKENS), seed=0)


def make_plan(folder: Path, rows_per_step: int) -> RunPlan:
    """The mixture of the corpus's prepared sources."""
    streams = {name: make_stream(name, folder / name) for name in SHARES}
    return _endless(Mixture(SHARES, rows_per_step), streams)


def simulated_plan(folder: Path) -> RunPlan:
    """A plan of one source of which only the manifest exists."""
    stream = Stream(
        "text",
        read_source(str(folder)).manifest,
        _no_shard,
        PackingOptions(row_tokens=ROW_TOKENS),
        lengths=None,
        seed=0,
    )
    mixture = Mixture({"text": 1.0}, ROWS_PER_STEP)
    return _endless(mixture, {"text": stream})


def _endless(mixture: Mixture, streams: Mapping[str, Stream]) -> RunPlan:
    """A plan whose rows keep their length, of more steps than any benchmark takes."""
    stages = [SequenceLengthStage(first_step=1, streams=streams)]
    return RunPlan(mixture=mixture, stages=stages, seed=0, steps=10**9, loss_shares=mixture.shares)


def _no_shard(index: int) -> Shard:
    raise AssertionError(f"shard {index} of a simulated source does not exist")


def open_reader(folder: Path, *, threaded: bool, skip: int) -> Reader:
    """The micro-batches after the first `skip` of the run; the state is how many were read."""
    plan = make_plan(folder, ROWS_PER_STEP)
    rank_rows = RankRows(rank=0, ranks=1, rows_per_step=ROWS_PER_STEP, micro_batch_rows=BATCH_ROWS)
    first, inside = 1 + skip // BATCHES_PER_STEP, skip % BATCHES_PER_STEP
    read = skip
    if threaded:
        steps = iter(Loader(plan, rank_rows, first=first, last=LAST_STEP, ahead=2))
    else:
        steps = (step_batch(plan, rank_rows, step) for step in count(first))

    def batches() -> Iterator[Batch]:
        nonlocal read
        for batch in islice(chain.from_iterable(map(_as_batches, steps)), inside, None):
            read += 1
            yield batch

    return Reader(batches=batches(), state=lambda: read)


def _as_batches(batch: StepBatch) -> Iterator[Batch]:
    """Tokens are counted without padding; the runs of loss tokens are in the place of the labels,
    which the device makes from them.
    """
    each = sum(batch.tokens.values()) / len(batch.micro_batches)
    return (Batch(part.ids_BT, part.lengths_K, round(each)) for part in batch.micro_batches)


def rank_step(plan: RunPlan, ranks: int, rank: int) -> Callable[[int], StepBatch]:
    """What one rank does for a step, of which it has eight rows."""
    rank_rows = RankRows(
        rank=rank, ranks=ranks, rows_per_step=plan.rows_per_step, micro_batch_rows=BATCH_ROWS
    )
    return lambda step: step_batch(plan, rank_rows, step)


def simulated_order(folder: Path, num_shards: int, num_rows: int) -> tuple[RowIds, list[int]]:
    """The first rows of a simulated source in bigmix's order, and how many rows each shard has."""
    write_simulated(folder, num_shards)
    stream = simulated_plan(folder).streams["text"]
    tokens = stream.manifest.shards.column("tokens")
    return stream.row_ids(np.arange(num_rows)), (-(-tokens // ROW_TOKENS)).tolist()
