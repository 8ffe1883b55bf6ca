"""An engine and held-out streams go in, the loss of each held-out source comes out, exact over any number of ranks."""

import math
from collections.abc import Mapping, Sequence
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
) -> dict[str, HeldOut]:
    """The held-out loss of each stream, over all of its rows or `max_rows` spread evenly over them; a collective.

    Every rank makes the same number of forwards, with rows of no loss token where it has run out of its own: under
    ZeRO-3 a rank that stayed away would leave the others waiting.
    """
    results = {}
    for name, stream in streams.items():
        losses = _losses_of_rank(engine, cluster, stream, micro_batch_rows, max_rows)
        everything = [loss for part in cluster.gather(losses) for loss in part]
        results[name] = summarise(stream, everything)
    return results


def _losses_of_rank(
    engine: Engine,
    cluster: Cluster,
    stream: Stream,
    micro_batch_rows: int,
    max_rows: int | None,
) -> list[DocumentLoss]:
    row_ids = _spread(stream.in_shard_order(), max_rows)
    own = row_ids[cluster.world.rank :: cluster.world.size]
    longest = -(-len(row_ids) // cluster.world.size)
    num_batches = -(-longest // micro_batch_rows)
    losses: list[DocumentLoss] = []
    with engine.evaluating():
        for index in range(num_batches):
            part = own[index * micro_batch_rows : (index + 1) * micro_batch_rows]
            batch, documents = _by_document(stream, part or row_ids[:1], is_idle=not part)
            _, sums_GM = engine.forward(tensors(batch, [0.0] * len(documents), engine.device))
            counts = batch.loss_tokens_P
            losses += [
                DocumentLoss(document=document, nll_sum=nll, loss_tokens=int(count))
                for document, nll, count in zip(
                    documents, GroupSums.of(sums_GM).nll_G.tolist(), counts, strict=True
                )
                if count
            ]
    return losses


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
