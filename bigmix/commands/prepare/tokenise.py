"""Tokenises records in batches, in this process or in several.

`in_batches` runs `tokenise` or `hashes_of` on one batch after another and gives the results in the
order of the records.

Letters: T tokens, D documents.
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
BATCH_RECORDS = 256
BATCH_CHARACTERS = 1 << 18  # a batch ends when it has as many
HASH_BYTES = 16

ResultT = TypeVar("ResultT")
Hashes = npt.NDArray[np.bytes_]
RawRecords = Sequence[RawRecord]


@dataclass(frozen=True, kw_only=True, slots=True)
class Job:
    """How records become tokens.

    `template` is None for texts; documents of more than `max_tokens` tokens are dropped.
    """

    tokenizer: Tokenizer
    layout: Layout
    template: Template | None
    max_tokens: int | None
    read: ReadOptions = field(default_factory=ReadOptions)


class DroppedRecord(NamedTuple):
    """A record without a document: its number in the batch, from 0, the reason, and where it was
    read, if that is known.
    """

    record: int
    reason: str
    place: str | None


@dataclass(frozen=True, kw_only=True, slots=True)
class TokenisedBatch:
    """The documents of `num_read` records by column, and the records without a document.

    `ids` and, for chats, `loss_mask` hold the tokens of all documents end to end [T]; the columns
    have one entry for each document [D]. `records` has the number of each document's record in the
    batch. Two documents with the same hash are the same: the same text, or the same rendered
    conversation.
    """

    num_read: int
    dropped: Sequence[DroppedRecord]
    ids: npt.NDArray[np.unsignedinteger[Any]]
    loss_mask: Flags | None
    records: Ints
    num_tokens: Ints
    loss_bytes: Ints
    text_bytes: Ints  # UTF-8; of a chat as it is rendered
    num_characters: Ints
    num_turns: Ints
    hashes: Hashes  # 16 bytes each

    @property
    def num_loss_tokens(self) -> Ints | None:
        """Tokens of each document that are in the loss [D]; None for texts, where all but the first
        are.
        """
        if self.loss_mask is None:
            return None
        before = np.concatenate([[0], np.cumsum(self.loss_mask)])
        ends = np.cumsum(self.num_tokens)
        counts: Ints = before[ends] - before[ends - self.num_tokens]
        return counts

    def split(self, num_records: int) -> "tuple[TokenisedBatch, TokenisedBatch]":
        """The batch of the first `num_records` records and that of the others."""
        at = int(self.records.searchsorted(num_records))
        begin, end = self._documents(0, at), self._documents(at, len(self.records))
        early = [each for each in self.dropped if each.record < num_records]
        late = [each for each in self.dropped if each.record >= num_records]
        return (
            replace(begin, num_read=num_records, dropped=early),
            replace(
                end,
                num_read=self.num_read - num_records,
                records=end.records - num_records,
                dropped=[each._replace(record=each.record - num_records) for each in late],
            ),
        )

    def select(self, keep: Flags, dropped: Sequence[DroppedRecord]) -> "TokenisedBatch":
        """Only the documents with a True [D], and another list of dropped records."""
        if keep.all():
            return replace(self, dropped=dropped)
        flags = np.repeat(keep, self.num_tokens)
        columns = {name: getattr(self, name)[keep] for name in _COLUMNS}
        mask = None if self.loss_mask is None else self.loss_mask[flags]
        return replace(self, dropped=dropped, ids=self.ids[flags], loss_mask=mask, **columns)

    def _documents(self, start: int, stop: int) -> "TokenisedBatch":
        begin, end = (int(self.num_tokens[:at].sum()) for at in (start, stop))
        columns = {name: getattr(self, name)[start:stop] for name in _COLUMNS}
        mask = None if self.loss_mask is None else self.loss_mask[begin:end]
        return replace(self, ids=self.ids[begin:end], loss_mask=mask, **columns)


_COLUMNS = (
    "records",
    "num_tokens",
    "loss_bytes",
    "text_bytes",
    "num_characters",
    "num_turns",
    "hashes",
)


class _ReadDocument(NamedTuple):
    """A document before it is tokenised: the number of its record, its text, and for a conversation
    how it is rendered.
    """

    record: int
    text: str
    utf8: bytes
    chat: RenderedChat | None


def tokenise(job: Job, records: RawRecords) -> TokenisedBatch:
    """Tokenise one batch of records."""
    found = list(_documents(job, records))
    documents = [each for each in found if isinstance(each, _ReadDocument)]
    dropped = [each for each in found if isinstance(each, DroppedRecord)]
    encode = _encode_texts if job.template is None else _encode_chats
    batch = encode(job, len(records), documents, dropped)
    if job.max_tokens is None:
        return batch
    fits = batch.num_tokens <= job.max_tokens
    dropped += [_dropped(records, number, "too_long") for number in batch.records[~fits].tolist()]
    return batch.select(fits, sorted(dropped))


def hashes_of(job: Job, records: RawRecords) -> Hashes:
    """The hashes of the documents of one batch, without tokenising them."""
    return _hashes([each for each in _documents(job, records) if isinstance(each, _ReadDocument)])


def _encode_texts(
    job: Job, num_read: int, found: Sequence[_ReadDocument], dropped: Sequence[DroppedRecord]
) -> TokenisedBatch:
    encoded = job.tokenizer.encode_together([each.text for each in found])
    begin = 0 if job.tokenizer.bos_id is None else 1
    num_tokens = encoded.counts + begin + 1
    ends = np.cumsum(num_tokens)
    is_text = np.ones(num_tokens.sum(), np.bool_)
    is_text[ends - 1] = False
    ids = np.full(len(is_text), job.tokenizer.eos_id, np.uint32)
    if job.tokenizer.bos_id is not None:
        is_text[ends - num_tokens] = False
        ids[ends - num_tokens] = job.tokenizer.bos_id
    ids[is_text] = encoded.ids
    text_bytes = np.array([len(each.utf8) for each in found], np.int64)
    return TokenisedBatch(
        num_read=num_read,
        dropped=dropped,
        ids=ids.astype(token_dtype(job.tokenizer.vocab_size)),
        loss_mask=None,
        records=np.array([each.record for each in found], np.int64),
        num_tokens=num_tokens,
        loss_bytes=text_bytes,
        text_bytes=text_bytes,
        num_characters=np.array([len(each.text) for each in found], np.int64),
        num_turns=np.zeros_like(text_bytes),
        hashes=_hashes(found),
    )


def _encode_chats(
    job: Job, num_read: int, found: Sequence[_ReadDocument], dropped: Sequence[DroppedRecord]
) -> TokenisedBatch:
    chats = [each.chat for each in found if each.chat is not None]
    encoded = encode_together(job.tokenizer, chats)
    return TokenisedBatch(
        num_read=num_read,
        dropped=dropped,
        ids=encoded.ids.astype(token_dtype(job.tokenizer.vocab_size)),
        loss_mask=encoded.loss_mask,
        records=np.array([each.record for each in found], np.int64),
        num_tokens=encoded.counts,
        loss_bytes=np.array([chat.answer_bytes for chat in chats], np.int64),
        text_bytes=np.array([len(each.utf8) for each in found], np.int64),
        num_characters=np.array([len(each.text) for each in found], np.int64),
        num_turns=np.array([chat.num_turns for chat in chats], np.int64),
        hashes=_hashes(found),
    )


def _hashes(found: Sequence[_ReadDocument]) -> Hashes:
    """XXH3 of the text, and for a conversation also of the spans that are learned: a user can write
    text that looks like an answer.
    """
    digests = []
    for each in found:
        digest = xxhash.xxh3_128(each.utf8)
        if each.chat is not None:
            digest.update(repr((each.chat.spans, each.chat.hidden)).encode())
        digests.append(digest.digest())
    return np.frombuffer(b"".join(digests), f"S{HASH_BYTES}")


def _documents(job: Job, records: RawRecords) -> Iterator[_ReadDocument | DroppedRecord]:
    """The document of each record, or why there is none."""
    for number, raw in enumerate(records):
        record = parsed(raw, job.read)
        if record.columns is None:
            yield _dropped(records, number, "bad_line")
            continue
        found = _document(job, number, document_of(record.columns, job.layout))
        yield _dropped(records, number, found.reason) if isinstance(found, Dropped) else found


def _document(job: Job, number: int, document: Document) -> _ReadDocument | Dropped:
    if isinstance(document, Dropped):
        return document
    if isinstance(document, Text):
        utf8 = utf8_of(document.text)
        if utf8 is None:
            return Dropped(reason="not_unicode")
        return _ReadDocument(number, document.text, utf8, None)
    chat = render_chat(job.tokenizer, _template(job), document)
    return chat if isinstance(chat, Dropped) else _ReadDocument(number, chat.text, chat.utf8, chat)


def _template(job: Job) -> Template:
    assert job.template is not None, "chats have a template"
    return job.template


def _dropped(records: RawRecords, number: int, reason: str) -> DroppedRecord:
    # The name of a file need not be UTF-8.
    file = records[number].file.encode(errors="backslashreplace").decode()
    return DroppedRecord(number, reason, f"{file}:{records[number].number}")


def in_batches(
    work: Callable[[Job, RawRecords], ResultT],
    job: Job,
    records: Iterable[RawRecord],
    num_processes: int,
) -> Generator[ResultT, None, None]:
    """The results of `work(job, batch)` for each batch of the records, in order.

    They do not depend on the number of processes. A caller that may not take all of them closes the
    generator, which ends the processes. Raises BigmixError where a process dies.
    """
    batches = _batches(records)
    few = list(islice(batches, 2))
    batches = chain(few, batches)
    if num_processes == 1 or len(few) < 2:
        yield from (work(job, batch) for batch in batches)
        return
    light = replace(job, tokenizer=job.tokenizer.for_workers())
    pool = ProcessPoolExecutor(num_processes, _context(), initializer=_begin, initargs=(light,))
    waiting: deque[Future[ResultT]] = deque()
    try:
        for batch in batches:
            waiting.append(pool.submit(_work, work, batch))
            if len(waiting) >= IN_FLIGHT * num_processes:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    except BrokenProcessPool as error:
        raise BigmixError(
            f"one of {num_processes} tokenising processes died, most likely because memory ran out;"
            " run again with fewer --processes"
        ) from error
    finally:
        pool.shutdown(cancel_futures=True)


def start_early() -> None:
    """Begin the imports of the worker processes, while this process does other work."""
    _context()
    if _has_forkserver():
        forkserver.ensure_running()


def _context() -> Any:
    """How worker processes start: not by a fork of this process, which would break its tokenizer
    and the threads of its readers.
    """
    if not _has_forkserver():
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])  # the imports are paid once, not by each process
    return context


def _has_forkserver() -> bool:
    return "forkserver" in multiprocessing.get_all_start_methods()


# The job of a worker process, sent once: a tokenizer is too large to be sent with each batch.
_job: Job


def _begin(job: Job) -> None:
    global _job
    # Ctrl-C reaches the whole process group; only the main process decides what follows.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # The processes are the parallelism: no threads within them.
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


def _batches(records: Iterable[RawRecord]) -> Iterator[RawRecords]:
    batch: list[RawRecord] = []
    num_characters = 0
    for record in records:
        batch.append(record)
        line = record.line
        num_characters += len(line) if line is not None else _num_characters(record.columns)
        if len(batch) == BATCH_RECORDS or num_characters >= BATCH_CHARACTERS:
            yield batch
            batch, num_characters = [], 0
    if batch:
        yield batch


def _num_characters(value: Any) -> int:
    if isinstance(value, str):
        return len(value)
    if isinstance(value, dict):
        return sum(map(_num_characters, value.values()))
    return sum(map(_num_characters, value)) if isinstance(value, list) else 0
