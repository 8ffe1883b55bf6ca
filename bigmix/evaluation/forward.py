"""Runs a model over held-out rows and sums over each document, the same on any number of ranks.

Letters besides those of `data.records`: D documents, M sums of `held_out.Sum`.
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

# Columns that identify a part of a document, before the sums of `Sum`.
_SHARD, _DOCUMENT, _ROW, _PART_TOKENS, _DOCUMENT_TOKENS = range(5)
_IDS = 5


@dataclass(frozen=True, kw_only=True, slots=True)
class HeldOutSpec:
    """What is evaluated on a model, and how.

    At most `max_rows` rows of each source, spread evenly; None: all. `pieces` are the bytes of each
    id; None where they are unknown: last words are then not measured. `base` is the model that
    divergences are measured to; None: none are.
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

    None where a stop was requested on any rank, which is checked before each forward. Every rank
    makes the same number of forwards, with rows without loss tokens once it has none of its own
    left: under ZeRO-3 the others would wait for a rank that stopped early.
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
    """The rows of one forward and the number of each among all rows; the results of idle ones are
    not used.
    """

    row_ids: Sequence[RowId]
    numbers: Sequence[int]
    is_idle: bool


@dataclass(frozen=True, kw_only=True, slots=True)
class _Read:
    """The rows of a slice as a batch, what identifies each part (padding is one, too), and which
    loss tokens belong to a last word.
    """

    batch: MicroBatch
    ids_P5: Ints
    is_of_word_N: Flags
    is_idle: bool


def _slices(stream: Stream, world: World, held_out_spec: HeldOutSpec) -> Sequence[_Slice]:
    """The rows of a rank, in the same number of forwards as on every other rank."""
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
    """The sums over parts of documents in this rank's rows; None on all ranks where a stop was
    requested on one.
    """
    slices, stop = _slices(stream, cluster.world, held_out_spec), activity.stop_requested
    parts: list[Floats] = [np.zeros((0, _IDS + len(Sum)))]
    # Rows are read in a thread, so that a rank that waits for a shard still notices a stop request.
    reader = ThreadPoolExecutor(max_workers=1, thread_name_prefix="evaluation")
    try:
        with engine.evaluating():
            for number, rows in enumerate(slices, 1):
                activity.begin(
                    f"evaluation of {stream.name}, micro-batch {number} of {len(slices)}"
                )
                reading = reader.submit(_read, stream, rows, held_out_spec.pieces)
                must_stop = not is_done(reading, stop) or stop()
                if any(cluster.sum_counts([must_stop])):
                    return None
                parts.append(_sums_of_parts(engine, held_out_spec.base, reading.result()))
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
    assembled = assemble([stream], row_ids)
    batch = assembled.micro_batch(0, len(rows.row_ids))
    if rows.is_idle:
        none = np.zeros(0, np.int64)
        batch = replace(batch, begins_K=none, lengths_K=none)
    num_parts_R = np.diff(assembled.parts_R1)
    shards_P = np.repeat(row_ids.shards_R, num_parts_R)
    ids_P5 = np.stack(
        [
            shards_P,
            assembled.documents_P,
            np.repeat(rows.numbers, num_parts_R),
            np.diff(batch.starts_P, append=batch.ids_BT.size),
            _num_document_tokens(stream, shards_P, assembled.documents_P),
        ],
        axis=1,
    )
    is_of_word_N = np.zeros(int(batch.lengths_K.sum()), np.bool_)
    if pieces is not None:
        _mark_last_words(batch, pieces, is_of_word_N, is_text=stream.manifest.kind == "text")
    return _Read(batch=batch, ids_P5=ids_P5, is_of_word_N=is_of_word_N, is_idle=rows.is_idle)


def _num_document_tokens(stream: Stream, shards_P: Ints, documents_P: Ints) -> Ints:
    """The length in tokens of the whole document that each part is from; 0 for padding."""
    num_tokens_P = np.zeros_like(documents_P)
    for shard in dict.fromkeys(shards_P.tolist()):
        own = (shards_P == shard) & (documents_P != PADDING)
        num_tokens_P[own] = stream.lengths_of(shard)[documents_P[own]]
    return num_tokens_P


def _mark_last_words(
    batch: MicroBatch, pieces: Sequence[bytes], is_of_word_N: Flags, *, is_text: bool
) -> None:
    """Mark the loss tokens of the last word in the last run of each part; nothing where a token of
    the word is not in the loss.
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


def _sums_of_parts(engine: Evaluable, base: ReferenceModel | None, read: _Read) -> Floats:
    """What identifies each part of a document in a micro-batch, with its sums."""
    batch, num_parts = read.batch, len(read.ids_P5)
    parts_N = np.searchsorted(batch.starts_P, batch.kept_N, side="right") - 1
    # A part is two groups: its last word, and the rest of it.
    groups_N = parts_N + num_parts * read.is_of_word_N
    _, sums_GM = engine.forward(_grouped(batch, groups_N, 2 * num_parts, base, engine.device))
    sums = GroupSums.of(sums_GM.double())
    nll_2P, hits_2P, kl_2P = (
        torch.stack([sums.nll_G, sums.hits_G, sums.kl_G]).view(3, 2, num_parts).cpu().numpy()
    )
    num_word_tokens_P = np.bincount(parts_N[read.is_of_word_N], minlength=num_parts)
    sums_PM = np.zeros((num_parts, len(Sum)))
    sums_PM[:, Sum.TOKENS] = batch.loss_tokens_P
    sums_PM[:, Sum.NLL] = nll_2P.sum(axis=0)
    sums_PM[:, Sum.HITS] = hits_2P.sum(axis=0)
    sums_PM[:, Sum.KL] = kl_2P.sum(axis=0)
    sums_PM[:, Sum.WORDS] = num_word_tokens_P > 0
    sums_PM[:, Sum.WORD_HITS] = (num_word_tokens_P > 0) & (hits_2P[1] == num_word_tokens_P)
    is_document_P = (read.ids_P5[:, _DOCUMENT] != PADDING) & (not read.is_idle)
    identified: Floats = np.hstack([read.ids_P5, sums_PM])[is_document_P]
    return identified


def _grouped(
    batch: MicroBatch,
    groups_N: Ints,
    num_groups: int,
    base: ReferenceModel | None,
    device: torch.device,
) -> ModelTensors:
    """A micro-batch on the device whose loss tokens are in these groups, and in no objective."""
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
    """The sums over each document from its parts on all ranks, added up in a fixed order.

    The last word is that of the last part. A document has none where a part is missing, since it
    was cut off or not evaluated.
    """
    order = np.lexsort((parts[:, _ROW], parts[:, _DOCUMENT], parts[:, _SHARD]))
    parts = parts[order]
    keys, sums = parts[:, : _DOCUMENT + 1], parts[:, _IDS:]
    if not len(parts):
        return DocumentSums(ids_D2=keys.astype(np.int64), sums_DM=sums, has_kl=has_kl)
    firsts = np.flatnonzero(np.append(True, (keys[1:] != keys[:-1]).any(axis=1)))
    lasts = np.append(firsts[1:], len(parts)) - 1
    sums_DM = np.add.reduceat(sums, firsts)
    num_seen_D = np.add.reduceat(parts[:, _PART_TOKENS], firsts)
    is_whole_D = num_seen_D == parts[lasts, _DOCUMENT_TOKENS]
    for column in (Sum.WORDS, Sum.WORD_HITS):
        sums_DM[:, column] = sums[lasts, column] * is_whole_D
    has_loss_D = sums_DM[:, Sum.TOKENS] > 0
    return DocumentSums(
        ids_D2=keys[firsts][has_loss_D].astype(np.int64),
        sums_DM=sums_DM[has_loss_D],
        has_kl=has_kl,
    )
