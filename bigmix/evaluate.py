"""An engine and held-out streams go in, the loss of each held-out source comes out, exact over any number of ranks."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from bigmix.data.assemble import assemble
from bigmix.data.order import key_of
from bigmix.data.stream import Stream
from bigmix.dist import Cluster
from bigmix.engine import Engine
from bigmix.loss.terms import GroupSums
from bigmix.on_device import tensors
from bigmix.records import MicroBatch, RowId, RowPlaces
from bigmix.waiting import is_done
from bigmix.world import World

_RESAMPLES = 1000


@dataclass(frozen=True, kw_only=True, slots=True)
class HeldOut:
    """A source's held-out loss: nats per loss token with a 95 % interval, bits per byte of the text behind them."""

    loss: float
    low: float
    high: float
    bits_per_byte: float
    tokens: int
    documents: int


@dataclass(frozen=True, kw_only=True, slots=True)
class DocumentLoss:
    """The nll sum and the loss tokens of one document, or of the part of one that a row holds."""

    document: tuple[int, int]
    nll_sum: float
    loss_tokens: int


def evaluate(
    engine: Engine,
    cluster: Cluster,
    streams: Mapping[str, Stream],
    *,
    micro_batch_rows: int,
    max_rows: int | None,
    stop_asked: Callable[[], bool],
    doing: Callable[[str], None],
) -> dict[str, HeldOut] | None:
    """The held-out loss of each stream, over all of its rows or `max_rows` spread evenly over them; a collective.

    None where a rank is asked to stop: looked up before each forward. `doing` is told what begins. Every rank makes the
    same number of forwards, with rows of no loss token where it has run out of its own: under ZeRO-3 a rank that stayed
    away would leave the others waiting.
    """
    results = {}
    for name, stream in streams.items():
        losses = _losses_of_rank(
            engine,
            cluster,
            stream,
            _slices(stream, cluster.world, micro_batch_rows, max_rows),
            stop_asked=stop_asked,
            doing=doing,
        )
        if losses is None:
            return None
        everything = [loss for part in cluster.gather(losses) for loss in part]
        results[name] = summarise(stream, everything)
    return results


@dataclass(frozen=True, kw_only=True, slots=True)
class _Slice:
    """Rows of one forward; idle ones count for nothing."""

    row_ids: Sequence[RowId]
    is_idle: bool


def _slices(
    stream: Stream, world: World, micro_batch_rows: int, max_rows: int | None
) -> Sequence[_Slice]:
    """What a rank shows the model, in as many forwards as each of the others."""
    row_ids = _spread(stream.in_shard_order(), max_rows)
    own = row_ids[world.rank :: world.size]
    longest = -(-len(row_ids) // world.size)
    parts = [own[at : at + micro_batch_rows] for at in range(0, longest, micro_batch_rows)]
    return [_Slice(row_ids=part or row_ids[:1], is_idle=not part) for part in parts]


def _losses_of_rank(
    engine: Engine,
    cluster: Cluster,
    stream: Stream,
    slices: Sequence[_Slice],
    *,
    stop_asked: Callable[[], bool],
    doing: Callable[[str], None],
) -> list[DocumentLoss] | None:
    """The losses of the documents of this rank's slices; None on all ranks where one of them is asked to stop."""
    losses: list[DocumentLoss] = []
    # A thread reads, since a rank that waits for a shard must still hear that it is to stop.
    reader = ThreadPoolExecutor(max_workers=1, thread_name_prefix="evaluation")
    try:
        with engine.evaluating():
            for number, rows in enumerate(slices, 1):
                doing(f"evaluation of {stream.name}, micro-batch {number} of {len(slices)}")
                read = reader.submit(_by_document, stream, rows.row_ids, is_idle=rows.is_idle)
                if any(cluster.sum_counts([not is_done(read, stop_asked) or stop_asked()])):
                    return None
                losses += _losses_of(engine, *read.result())
    finally:
        reader.shutdown(wait=False)
    return losses


def _losses_of(
    engine: Engine, batch: MicroBatch, documents: Sequence[tuple[int, int]]
) -> Iterator[DocumentLoss]:
    _, sums_GM = engine.forward(tensors(batch, [0.0] * len(documents), engine.device))
    nll_G = GroupSums.of(sums_GM).nll_G.tolist()
    for document, nll, count in zip(documents, nll_G, batch.loss_tokens_P, strict=True):
        if count:
            yield DocumentLoss(document=document, nll_sum=nll, loss_tokens=int(count))


def _spread(row_ids: Sequence[RowId], most: int | None) -> Sequence[RowId]:
    if most is None or most >= len(row_ids):
        return row_ids
    return [row_ids[index * len(row_ids) // most] for index in range(most)]


def _by_document(
    stream: Stream, row_ids: Sequence[RowId], *, is_idle: bool
) -> tuple[MicroBatch, list[tuple[int, int]]]:
    """The rows as a micro-batch whose groups are parts, and which (shard, document) each is from."""
    places = RowPlaces(
        names=(stream.name,),
        sources_R=np.zeros(len(row_ids), np.int64),
        epochs_R=np.zeros(len(row_ids), np.int64),
        shards_R=np.array([row_id.shard for row_id in row_ids]),
        rows_R=np.array([row_id.row for row_id in row_ids]),
    )
    rows = assemble([stream], places)
    shards_P = np.repeat(places.shards_R, np.diff(rows.parts_R1))
    documents = list(zip(shards_P.tolist(), rows.documents_P.tolist(), strict=True))
    batch = rows.micro_batch(0, len(row_ids))
    runs = slice(0) if is_idle else slice(None)
    batch = replace(
        batch,
        groups_P=np.arange(len(documents)),
        begins_K=batch.begins_K[runs],
        lengths_K=batch.lengths_K[runs],
    )
    return batch, documents


def summarise(stream: Stream, losses: Sequence[DocumentLoss]) -> HeldOut:
    """One division over all documents, and the spread of it when whole documents are drawn again with replacement."""
    by_document: dict[tuple[int, int], tuple[float, int]] = {}
    for loss in losses:
        nll, count = by_document.get(loss.document, (0.0, 0))
        by_document[loss.document] = (nll + loss.nll_sum, count + loss.loss_tokens)
    ordered = np.array([by_document[key] for key in sorted(by_document)], np.float64)
    nll_sum, tokens = ordered.sum(axis=0) if len(ordered) else (math.nan, 0)
    mean = float(nll_sum / tokens) if tokens else math.nan
    low, high = _interval(ordered, key_of("interval", stream.name))
    manifest = stream.manifest
    tokens_per_byte = manifest.loss_tokens / manifest.loss_bytes
    return HeldOut(
        loss=mean,
        low=low,
        high=high,
        bits_per_byte=mean * tokens_per_byte / math.log(2),
        tokens=int(tokens),
        documents=len(ordered),
    )


def _interval(nll_and_tokens: npt.NDArray[np.float64], key: int) -> tuple[float, float]:
    """The 2.5 and 97.5 % points of the mean over resampled documents (bootstrap: Efron, 1979)."""
    count = len(nll_and_tokens)
    if not count:
        return math.nan, math.nan
    draws = np.random.default_rng(key)
    means = []
    for _ in range(_RESAMPLES):
        nll, tokens = nll_and_tokens[draws.integers(0, count, count)].sum(axis=0)
        means.append(nll / tokens)
    low, high = np.quantile(means, [0.025, 0.975])
    return float(low), float(high)
