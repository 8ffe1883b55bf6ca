"""Rows and a job go in, batches of tokenised documents come out in the order of the rows, from one
process or many.

A function and batches go in, its results come out in the order of the batches, from several
processes.
"""

import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field, replace
from itertools import chain, islice
from multiprocessing import forkserver
from typing import Any, NamedTuple, TypeVar

import numpy as np
import numpy.typing as npt
import xxhash

from bigmix.data.shards.manifest import token_dtype
from bigmix.errors import BigmixError
from bigmix.text.chat_template import Template, render_chat
from bigmix.text.chat_tokens import RenderedChat, encode_together
from bigmix.text.formats import Document, Dropped, Layout, Text, document_of, utf8_of
from bigmix.text.readers import RawRecord, ReadOptions, parsed
from bigmix.text.tokenizer import Tokenizer
from bigmix.types import Flags, Ints

IN_FLIGHT = 3  # batches per process that are read ahead: bounds the memory

BATCH_ROWS = 256
BATCH_CHARACTERS = 1 << 18
HASH_BYTES = 16

ResultT = TypeVar("ResultT")
Hashes = npt.NDArray[np.bytes_]
RawRecords = Sequence[RawRecord]


@dataclass(frozen=True, kw_only=True, slots=True)
class Job:
    """How rows become tokens; `template` is None for texts."""

    tokenizer: Tokenizer
    layout: Layout
    template: Template | None
    max_tokens: int | None
    read: ReadOptions = field(default_factory=ReadOptions)


class DroppedRow(NamedTuple):
    """The row of a batch, counted from 0, that gave no document, why, and where it was read, if
    that is known.
    """

    row: int
    reason: str
    place: str | None


@dataclass(frozen=True, kw_only=True, slots=True)
class TokenisedBatch:
    """The documents of `read` rows by column, and the rows that gave none.

    `ids` and, for chats, `loss_mask` hold the tokens of all documents end to end [T]; the columns
    have one entry a document [D]. Two documents with the same hash are the same: the same text, or
    the same rendered conversation.
    """

    read: int
    dropped: Sequence[DroppedRow]
    ids: npt.NDArray[np.unsignedinteger[Any]]
    loss_mask: Flags | None
    rows: Ints  # the row of each document
    tokens: Ints
    loss_bytes: Ints
    text_bytes: Ints  # UTF-8, of a chat as it is rendered
    characters: Ints
    turns: Ints
    hashes: Hashes  # 16 bytes each

    @property
    def loss_tokens(self) -> Ints | None:
        """Tokens of each document that are in the loss [D]; None for texts, where all but the first
        are.
        """
        if self.loss_mask is None:
            return None
        before = np.concatenate([[0], np.cumsum(self.loss_mask)])
        ends = np.cumsum(self.tokens)
        counts: Ints = before[ends] - before[ends - self.tokens]
        return counts

    def split(self, rows: int) -> "tuple[TokenisedBatch, TokenisedBatch]":
        """The batch of the first `rows` rows and that of the others."""
        at = int(self.rows.searchsorted(rows))
        begin, end = self._documents(0, at), self._documents(at, len(self.rows))
        return (
            replace(begin, read=rows, dropped=[each for each in self.dropped if each.row < rows]),
            replace(
                end,
                read=self.read - rows,
                rows=end.rows - rows,
                dropped=[d._replace(row=d.row - rows) for d in self.dropped if d.row >= rows],
            ),
        )

    def select(self, keep: Flags, dropped: Sequence[DroppedRow]) -> "TokenisedBatch":
        """Only the documents with a True [D], and another list of what was dropped."""
        if keep.all():
            return replace(self, dropped=dropped)
        flags = np.repeat(keep, self.tokens)
        columns = {name: getattr(self, name)[keep] for name in _COLUMNS}
        mask = None if self.loss_mask is None else self.loss_mask[flags]
        return replace(self, dropped=dropped, ids=self.ids[flags], loss_mask=mask, **columns)

    def _documents(self, start: int, stop: int) -> "TokenisedBatch":
        begin, end = (int(self.tokens[:at].sum()) for at in (start, stop))
        columns = {name: getattr(self, name)[start:stop] for name in _COLUMNS}
        mask = None if self.loss_mask is None else self.loss_mask[begin:end]
        return replace(self, ids=self.ids[begin:end], loss_mask=mask, **columns)


_COLUMNS = ("rows", "tokens", "loss_bytes", "text_bytes", "characters", "turns", "hashes")


class _Found(NamedTuple):
    """A document before its tokens: its text, and for a chat how it is rendered."""

    row: int
    text: str
    utf8: bytes
    chat: RenderedChat | None


def tokenise(job: Job, rows: RawRecords) -> TokenisedBatch:
    """Tokenise one batch."""
    found = list(_documents(job, rows))
    documents = [each for each in found if isinstance(each, _Found)]
    dropped = [each for each in found if isinstance(each, DroppedRow)]
    encode = _encode_texts if job.template is None else _encode_chats
    batch = encode(job, len(rows), documents, dropped)
    if job.max_tokens is None:
        return batch
    fits = batch.tokens <= job.max_tokens
    dropped += [_dropped(rows, row, "too_long") for row in batch.rows[~fits].tolist()]
    return batch.select(fits, sorted(dropped))


def hashes_of(job: Job, rows: RawRecords) -> Hashes:
    """The hashes of the documents of one batch."""
    return _hashes([each for each in _documents(job, rows) if isinstance(each, _Found)])


def _encode_texts(
    job: Job, read: int, found: Sequence[_Found], dropped: Sequence[DroppedRow]
) -> TokenisedBatch:
    encoded = job.tokenizer.encode_together([each.text for each in found])
    begin = 0 if job.tokenizer.bos_id is None else 1
    tokens = encoded.counts + begin + 1
    ends = np.cumsum(tokens)
    is_text = np.ones(tokens.sum(), np.bool_)
    is_text[ends - 1] = False
    ids = np.full(len(is_text), job.tokenizer.eos_id, np.uint32)
    if job.tokenizer.bos_id is not None:
        is_text[ends - tokens] = False
        ids[ends - tokens] = job.tokenizer.bos_id
    ids[is_text] = encoded.ids
    text_bytes = np.array([len(each.utf8) for each in found], np.int64)
    return TokenisedBatch(
        read=read,
        dropped=dropped,
        ids=ids.astype(token_dtype(job.tokenizer.vocab_size)),
        loss_mask=None,
        rows=np.array([each.row for each in found], np.int64),
        tokens=tokens,
        loss_bytes=text_bytes,
        text_bytes=text_bytes,
        characters=np.array([len(each.text) for each in found], np.int64),
        turns=np.zeros_like(text_bytes),
        hashes=_hashes(found),
    )


def _encode_chats(
    job: Job, read: int, found: Sequence[_Found], dropped: Sequence[DroppedRow]
) -> TokenisedBatch:
    chats = [each.chat for each in found if each.chat is not None]
    encoded = encode_together(job.tokenizer, chats)
    return TokenisedBatch(
        read=read,
        dropped=dropped,
        ids=encoded.ids.astype(token_dtype(job.tokenizer.vocab_size)),
        loss_mask=encoded.loss_mask,
        rows=np.array([each.row for each in found], np.int64),
        tokens=encoded.counts,
        loss_bytes=np.array([chat.answer_bytes for chat in chats], np.int64),
        text_bytes=np.array([len(each.utf8) for each in found], np.int64),
        characters=np.array([len(each.text) for each in found], np.int64),
        turns=np.array([chat.num_turns for chat in chats], np.int64),
        hashes=_hashes(found),
    )


def _hashes(found: Sequence[_Found]) -> Hashes:
    """XXH3 of the text; of a chat also of what is learned in it, for a user can write what looks
    like an answer.
    """
    digests = []
    for each in found:
        digest = xxhash.xxh3_128(each.utf8)
        if each.chat is not None:
            digest.update(repr((each.chat.spans, each.chat.hidden)).encode())
        digests.append(digest.digest())
    return np.frombuffer(b"".join(digests), f"S{HASH_BYTES}")


def _documents(job: Job, rows: RawRecords) -> Iterator[_Found | DroppedRow]:
    """A document for each row, or why there is none."""
    for number, raw in enumerate(rows):
        row = parsed(raw, job.read)
        if row.columns is None:
            yield _dropped(rows, number, "bad_line")
            continue
        found = _document(job, number, document_of(row.columns, job.layout))
        yield _dropped(rows, number, found.reason) if isinstance(found, Dropped) else found


def _document(job: Job, number: int, document: Document) -> _Found | Dropped:
    if isinstance(document, Dropped):
        return document
    if isinstance(document, Text):
        utf8 = utf8_of(document.text)
        if utf8 is None:
            return Dropped(reason="not_unicode")
        return _Found(number, document.text, utf8, None)
    chat = render_chat(job.tokenizer, _template(job), document)
    return chat if isinstance(chat, Dropped) else _Found(number, chat.text, chat.utf8, chat)


def _template(job: Job) -> Template:
    assert job.template is not None, "chats have a template"
    return job.template


def _dropped(rows: RawRecords, row: int, reason: str) -> DroppedRow:
    # The name of a file need not be UTF-8.
    file = rows[row].file.encode(errors="backslashreplace").decode()
    return DroppedRow(row, reason, f"{file}:{rows[row].number}")


def in_batches(
    work: Callable[[Job, RawRecords], ResultT],
    job: Job,
    rows: Iterable[RawRecord],
    processes: int,
) -> Generator[ResultT, None, None]:
    """`work(job, batch)` for each batch of the rows, in order, in this process or in several.

    The documents and their order do not depend on the number of processes. Close the generator
    where not all of it is taken: that ends the processes. Raises BigmixError where a process dies.
    """
    batches = _batches(rows)
    few = list(islice(batches, 2))
    batches = chain(few, batches)
    if processes == 1 or len(few) < 2:
        yield from (work(job, batch) for batch in batches)
        return
    light = replace(job, tokenizer=job.tokenizer.for_workers())
    pool = ProcessPoolExecutor(processes, _context(), initializer=_begin, initargs=(light,))
    waiting: deque[Future[ResultT]] = deque()
    try:
        for batch in batches:
            waiting.append(pool.submit(_work, work, batch))
            if len(waiting) >= IN_FLIGHT * processes:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    except BrokenProcessPool as error:
        raise BigmixError(
            f"one of {processes} tokenising processes died, most likely for want of memory; run"
            " again with fewer --processes"
        ) from error
    finally:
        pool.shutdown(cancel_futures=True)


def start_early() -> None:
    """Begin the imports that the processes need, while this one has other things to do."""
    _context()
    if _has_forkserver():
        forkserver.ensure_running()


def _context() -> Any:
    """How the processes start: not by a fork of this one, whose tokenizer and reader threads a fork
    would break.
    """
    if not _has_forkserver():
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])  # the imports are paid once, not by each process
    return context


def _has_forkserver() -> bool:
    return "forkserver" in multiprocessing.get_all_start_methods()


# The job of a worker process, given once: a tokenizer is too large to travel with each batch.
_job: Job


def _begin(job: Job) -> None:
    global _job
    # ctrl-C reaches the whole group; the main process alone decides what follows.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # The processes are the parallelism.
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    threading.Thread(target=_end_with_parent, daemon=True).start()
    _job = job


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _work(work: Callable[[Job, RawRecords], ResultT], batch: RawRecords) -> ResultT:
    return work(_job, batch)


def _batches(rows: Iterable[RawRecord]) -> Iterator[RawRecords]:
    batch: list[RawRecord] = []
    characters = 0
    for row in rows:
        batch.append(row)
        characters += len(row.line) if row.line is not None else _characters(row.columns)
        if len(batch) == BATCH_ROWS or characters >= BATCH_CHARACTERS:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch


def _characters(value: Any) -> int:
    if isinstance(value, str):
        return len(value)
    if isinstance(value, dict):
        return sum(map(_characters, value.values()))
    return sum(map(_characters, value)) if isinstance(value, list) else 0
