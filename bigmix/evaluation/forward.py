"""A model and held-out streams go in, sums over each document come out, exact over any number of
ranks.

Letters beside those of `records`: D documents, M sums of `held_out.Sum`.
"""

from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace

import numpy as np
import torch

from bigmix.cluster.collectives import Cluster
from bigmix.cluster.signals import Activity, is_done
from bigmix.cluster.world import World
from bigmix.data.batch import assemble
from bigmix.data.packing import PADDING
from bigmix.data.records import MicroBatch, RowId, RowIds
from bigmix.data.stream import Stream
from bigmix.evaluation.held_out import DocumentSums, Sum
from bigmix.loss.terms import GroupSums
from bigmix.model.causal_lm import ModelTensors
from bigmix.model.engine import Evaluable
from bigmix.model.inputs import ReferenceModel, array_to_device, to_device, to_device_with_reference
from bigmix.seeding import evenly_spaced
from bigmix.text.last_word import TAIL, last_word
from bigmix.types import Flags, Floats, Ints

# Columns of what a rank knows of a part of a document, before the sums of `Sum`.
_SHARD, _DOCUMENT, _ROW, _PART_TOKENS, _DOCUMENT_TOKENS = range(5)
_IDS = 5


@dataclass(frozen=True, kw_only=True, slots=True)
class HeldOutSpec:
    """What an evaluation asks of a model.

    `max_rows` of each source at most, spread evenly; None: all. `pieces` are the bytes of each id,
    None where they are not known: then last words are not asked for. `base` is the model that
    divergences are measured to.
    """

    held_out: Mapping[str, Stream]
    micro_batch_rows: int
    max_rows: int | None
    pieces: Sequence[bytes] | None
    base: ReferenceModel | None


def evaluate(
    engine: Evaluable,
    cluster: Cluster,
    held_out_spec: HeldOutSpec,
    activity: Activity,
) -> dict[str, DocumentSums] | None:
    """The sums over each document of each source; a collective.

    None where a stop was requested of any rank, which is looked up before each forward.
    Every rank makes the same number of forwards, with rows of no loss token where it has run out of
    its own: under ZeRO-3 a rank that stayed away would leave the others waiting.
    """
    results = {}
    for name, stream in held_out_spec.held_out.items():
        parts = _parts_of_rank(engine, cluster, held_out_spec, stream, activity)
        if parts is None:
            return None
        everything = np.concatenate(cluster.gather(parts))
        results[name] = by_document(everything, has_kl=held_out_spec.base is not None)
    return results


@dataclass(frozen=True, kw_only=True, slots=True)
class _Slice:
    """Rows of one forward, and the number of each among all; idle ones count for nothing."""

    row_ids: Sequence[RowId]
    numbers: Sequence[int]
    is_idle: bool


@dataclass(frozen=True, kw_only=True, slots=True)
class _Read:
    """The rows of a slice: what each part is, padding among them, and which loss tokens are of a
    last word.
    """

    batch: MicroBatch
    ids_P5: Ints
    is_of_word_N: Flags
    is_idle: bool


def _slices(stream: Stream, world: World, held_out_spec: HeldOutSpec) -> Sequence[_Slice]:
    """What a rank shows the model, in as many forwards as each of the others."""
    row_ids, size = stream.in_shard_order(), held_out_spec.micro_batch_rows
    numbers = evenly_spaced(range(len(row_ids)), held_out_spec.max_rows)
    own = numbers[world.rank :: world.size]
    longest = -(-len(numbers) // world.size)
    parts = [own[at : at + size] for at in range(0, longest, size)]
    return [
        _Slice(
            row_ids=[row_ids[n] for n in part or numbers[:1]],
            numbers=part or numbers[:1],
            is_idle=not part,
        )
        for part in parts
    ]


def _parts_of_rank(
    engine: Evaluable,
    cluster: Cluster,
    held_out_spec: HeldOutSpec,
    stream: Stream,
    activity: Activity,
) -> Floats | None:
    """What this rank knows of parts of documents; None on all ranks where one of them is asked to
    stop.
    """
    slices, stop = _slices(stream, cluster.world, held_out_spec), activity.stop_requested
    parts: list[Floats] = [np.zeros((0, _IDS + len(Sum)))]
    # A thread reads, since a rank that waits for a shard must still hear that it is to stop.
    reader = ThreadPoolExecutor(max_workers=1, thread_name_prefix="evaluation")
    try:
        with engine.evaluating():
            for number, rows in enumerate(slices, 1):
                activity.begin(
                    f"evaluation of {stream.name}, micro-batch {number} of {len(slices)}"
                )
                reading = reader.submit(_read, stream, rows, held_out_spec.pieces)
                stops = not is_done(reading, stop) or stop()
                if any(cluster.sum_counts([stops])):
                    return None
                parts.append(_measured(engine, held_out_spec.base, reading.result()))
    finally:
        reader.shutdown(wait=False)
    return np.concatenate(parts)


def _read(stream: Stream, rows: _Slice, pieces: Sequence[bytes] | None) -> _Read:
    row_ids = RowIds(
        names=(stream.name,),
        sources_R=np.zeros(len(rows.row_ids), np.int64),
        epochs_R=np.zeros(len(rows.row_ids), np.int64),
        shards_R=np.array([row_id.shard for row_id in rows.row_ids]),
        rows_R=np.array([row_id.row for row_id in rows.row_ids]),
    )
    found = assemble([stream], row_ids)
    batch = found.micro_batch(0, len(rows.row_ids))
    if rows.is_idle:
        none = np.zeros(0, np.int64)
        batch = replace(batch, begins_K=none, lengths_K=none)
    parts_R = np.diff(found.parts_R1)
    shards_P = np.repeat(row_ids.shards_R, parts_R)
    ids_P5 = np.stack(
        [
            shards_P,
            found.documents_P,
            np.repeat(rows.numbers, parts_R),
            np.diff(batch.starts_P, append=batch.ids_BT.size),
            _document_tokens(stream, shards_P, found.documents_P),
        ],
        axis=1,
    )
    is_of_word_N = np.zeros(int(batch.lengths_K.sum()), np.bool_)
    if pieces is not None:
        _mark_last_words(batch, pieces, is_of_word_N, is_text=stream.manifest.kind == "text")
    return _Read(batch=batch, ids_P5=ids_P5, is_of_word_N=is_of_word_N, is_idle=rows.is_idle)


def _document_tokens(stream: Stream, shards_P: Ints, documents_P: Ints) -> Ints:
    """The tokens of the whole document that each part is from; 0 for padding."""
    tokens_P = np.zeros_like(documents_P)
    for shard in dict.fromkeys(shards_P.tolist()):
        own = (shards_P == shard) & (documents_P != PADDING)
        tokens_P[own] = stream.lengths_of(shard)[documents_P[own]]
    return tokens_P


def _mark_last_words(
    batch: MicroBatch, pieces: Sequence[bytes], is_of_word_N: Flags, *, is_text: bool
) -> None:
    """Mark the loss tokens of the last word of the last run of each part; none where one of its
    tokens is not in the loss.
    """
    parts_K = np.searchsorted(batch.starts_P, batch.begins_K, side="right") - 1
    is_last_K = np.append(parts_K[1:] != parts_K[:-1], True)[: len(parts_K)]
    ends_K, ids_X = np.cumsum(batch.lengths_K), batch.ids_BT.ravel()
    for run in np.flatnonzero(is_last_K).tolist():
        begin, length, end = batch.begins_K[run], batch.lengths_K[run], ends_K[run]
        # The first token of a part of a text is not in the loss, but its last word may begin there.
        before = 1 if is_text else 0
        span = ids_X[begin + 1 - before : begin + 1 + length]
        tail = [pieces[token] for token in span[-TAIL:].tolist()]
        word = last_word(tail, is_whole=len(tail) == len(span))
        if word is None or (len(tail) > length and word.start == 0):
            continue
        is_of_word_N[end - len(tail) + word.start : end - len(tail) + word.stop] = True


def _measured(engine: Evaluable, base: ReferenceModel | None, read: _Read) -> Floats:
    """The parts of documents of a micro-batch, with their sums."""
    batch, parts = read.batch, len(read.ids_P5)
    parts_N = np.searchsorted(batch.starts_P, batch.kept_N, side="right") - 1
    groups_N = parts_N + parts * read.is_of_word_N
    _, sums_GM = engine.forward(_grouped(batch, groups_N, 2 * parts, base, engine.device))
    sums = GroupSums.of(sums_GM.double())
    nll_2P, hits_2P, kl_2P = (
        torch.stack([sums.nll_G, sums.hits_G, sums.kl_G]).view(3, 2, parts).cpu().numpy()
    )
    word_tokens_P = np.bincount(parts_N[read.is_of_word_N], minlength=parts)
    found_PM = np.zeros((parts, len(Sum)))
    found_PM[:, Sum.TOKENS] = batch.loss_tokens_P
    found_PM[:, Sum.NLL] = nll_2P.sum(axis=0)
    found_PM[:, Sum.HITS] = hits_2P.sum(axis=0)
    found_PM[:, Sum.KL] = kl_2P.sum(axis=0)
    found_PM[:, Sum.WORDS] = word_tokens_P > 0
    found_PM[:, Sum.WORD_HITS] = (word_tokens_P > 0) & (hits_2P[1] == word_tokens_P)
    is_document_P = (read.ids_P5[:, _DOCUMENT] != PADDING) & (not read.is_idle)
    measured: Floats = np.hstack([read.ids_P5, found_PM])[is_document_P]
    return measured


def _grouped(
    batch: MicroBatch,
    groups_N: Ints,
    num_groups: int,
    base: ReferenceModel | None,
    device: torch.device,
) -> ModelTensors:
    """A micro-batch on the device whose loss tokens are in groups of their own; none is in an
    objective.
    """
    together = replace(batch, groups_P=np.zeros_like(batch.groups_P))
    if base is None:
        moved = to_device(together, [0.0], device)
    else:
        moved = to_device_with_reference(
            together,
            np.arange(len(batch.ids_BT)),
            base,
            coefficients_S=[0.0],
            divergences_S=[0.0],
            device=device,
            weights_P=None,
        )
    tokens = replace(
        moved.tokens, groups_N=array_to_device(groups_N, device), num_groups=num_groups
    )
    return replace(moved, tokens=tokens)


def by_document(parts: Floats, *, has_kl: bool) -> DocumentSums:
    """Parts of documents from all ranks, added up in an order of their own.

    The last word is that of the last part, and none where a part is missing: one that was not
    evaluated, or cut off.
    """
    order = np.lexsort((parts[:, _ROW], parts[:, _DOCUMENT], parts[:, _SHARD]))
    parts = parts[order]
    keys, sums = parts[:, : _DOCUMENT + 1], parts[:, _IDS:]
    if not len(parts):
        return DocumentSums(ids_D2=keys.astype(np.int64), sums_DM=sums, has_kl=has_kl)
    firsts = np.flatnonzero(np.append(True, (keys[1:] != keys[:-1]).any(axis=1)))
    lasts = np.append(firsts[1:], len(parts)) - 1
    sums_DM = np.add.reduceat(sums, firsts)
    seen_D = np.add.reduceat(parts[:, _PART_TOKENS], firsts)
    is_whole_D = seen_D == parts[lasts, _DOCUMENT_TOKENS]
    for column in (Sum.WORDS, Sum.WORD_HITS):
        sums_DM[:, column] = sums[lasts, column] * is_whole_D
    has_loss_D = sums_DM[:, Sum.TOKENS] > 0
    return DocumentSums(
        ids_D2=keys[firsts][has_loss_D].astype(np.int64),
        sums_DM=sums_DM[has_loss_D],
        has_kl=has_kl,
    )
