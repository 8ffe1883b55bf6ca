"""Rows and a job go in, batches of tokenised documents come out in the order of the rows, from one process or many."""

import multiprocessing
import os
import signal
import threading
from collections import Counter, deque
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from itertools import chain, islice
from typing import Any

import numpy as np
import numpy.typing as npt

from bigmix.data.chat import EncodedChat, Template, encode_chat
from bigmix.data.documents import RawRow
from bigmix.data.recognise import Conversation, Document, Dropped, Layout, Text, document_of
from bigmix.data.tokenizer import Ids, Tokenizer
from bigmix.errors import BigmixError

BATCH_ROWS = 256
BATCH_CHARACTERS = 1 << 18
IN_FLIGHT = 3  # batches per process that are read ahead: bounds the memory

Mask = npt.NDArray[np.bool_]


@dataclass(frozen=True, kw_only=True, slots=True)
class Job:
    """How rows become tokens; `template` is None for texts."""

    tokenizer: Tokenizer
    layout: Layout
    template: Template | None
    max_tokens: int | None


@dataclass(frozen=True, kw_only=True, slots=True)
class TokenisedDocument:
    """Token ids [T], for a chat which of them are in the loss [T], and the bytes of text behind the loss."""

    ids: Ids
    loss_mask: Mask | None
    loss_bytes: int


@dataclass(frozen=True, kw_only=True, slots=True)
class TokenisedBatch:
    """The documents of `read` rows; `dropped` counts the others by reason, with the place of the first of each."""

    read: int
    documents: Sequence[TokenisedDocument]
    dropped: Mapping[str, int]
    first_dropped: Mapping[str, str]


def tokenised(
    job: Job, rows: Iterable[RawRow], processes: int
) -> Generator[TokenisedBatch, None, None]:
    """Tokenise rows in batches; the batches and their order do not depend on the number of processes.

    To be closed by who does not take all of it: that ends the processes.
    """
    batches = _batches(rows)
    few = list(islice(batches, 2))
    batches = chain(few, batches)
    if processes == 1 or len(few) < 2:
        return (tokenise(job, batch) for batch in batches)
    return _tokenised_in_processes(job, batches, processes)


def tokenise(job: Job, rows: Sequence[RawRow]) -> TokenisedBatch:
    """Tokenise one batch."""
    dropped: Counter[str] = Counter()
    first_dropped: dict[str, str] = {}
    documents = []
    read = [
        Dropped(reason="bad_line") if row.columns is None else document_of(row.columns, job.layout)
        for row in rows
    ]
    for row, found in zip(rows, _encode(job, read), strict=True):
        kept = _within(found, job.max_tokens)
        if isinstance(kept, Dropped):
            dropped[kept.reason] += 1
            first_dropped.setdefault(kept.reason, f"{row.file}:{row.index}")
        else:
            documents.append(kept)
    return TokenisedBatch(
        read=len(rows), documents=documents, dropped=dropped, first_dropped=first_dropped
    )


def _within(
    found: TokenisedDocument | Dropped, max_tokens: int | None
) -> TokenisedDocument | Dropped:
    too_long = (
        isinstance(found, TokenisedDocument)
        and max_tokens is not None
        and len(found.ids) > max_tokens
    )
    return Dropped(reason="too_long") if too_long else found


def _encode(job: Job, documents: Sequence[Document]) -> Iterator[TokenisedDocument | Dropped]:
    """One result for each document; the texts of a batch are encoded together."""
    texts = iter(job.tokenizer.encode([each.text for each in documents if isinstance(each, Text)]))
    for document in documents:
        if isinstance(document, Text):
            yield _framed(job.tokenizer, next(texts), document)
        elif isinstance(document, Conversation):
            yield _chat(job, document)
        else:
            yield document


def _framed(tokenizer: Tokenizer, ids: Ids, document: Text) -> TokenisedDocument:
    bos = [] if tokenizer.bos_id is None else [tokenizer.bos_id]
    ends = np.array(bos, np.uint32), ids, np.array([tokenizer.eos_id], np.uint32)
    return TokenisedDocument(
        ids=np.concatenate(ends), loss_mask=None, loss_bytes=len(document.text.encode())
    )


def _chat(job: Job, document: Conversation) -> TokenisedDocument | Dropped:
    assert job.template is not None, "chats have a template"
    chat = encode_chat(job.tokenizer, job.template, document)
    if isinstance(chat, EncodedChat):
        return TokenisedDocument(
            ids=chat.ids, loss_mask=chat.loss_mask, loss_bytes=chat.answer_bytes
        )
    return chat


def _batches(rows: Iterable[RawRow]) -> Iterator[Sequence[RawRow]]:
    batch: list[RawRow] = []
    characters = 0
    for row in rows:
        batch.append(row)
        characters += _characters(row.columns)
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


def _tokenised_in_processes(
    job: Job, batches: Iterable[Sequence[RawRow]], processes: int
) -> Generator[TokenisedBatch, None, None]:
    pool = ProcessPoolExecutor(processes, _context(), initializer=_begin_worker, initargs=(job,))
    waiting: deque[Future[TokenisedBatch]] = deque()
    try:
        for batch in batches:
            waiting.append(pool.submit(_tokenise_in_worker, batch))
            if len(waiting) >= IN_FLIGHT * processes:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    except BrokenProcessPool as error:
        raise BigmixError(
            f"one of {processes} tokenising processes died, most likely for want of memory; run again with fewer "
            "--processes"
        ) from error
    finally:
        pool.shutdown(cancel_futures=True)


def _context() -> Any:
    """How workers start: not by a fork of this process, whose tokenizer and reader threads a fork would break."""
    if "forkserver" not in multiprocessing.get_all_start_methods():
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])  # the imports are paid once, not by each worker
    return context


# The job of a worker process, given once: a tokenizer is too large to travel with each batch.
_tokenise: Callable[[Sequence[RawRow]], TokenisedBatch]


def _begin_worker(job: Job) -> None:
    global _tokenise
    # ctrl-C reaches the whole group; the main process alone decides what follows.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # The processes are the parallelism.
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    threading.Thread(target=_end_with_parent, daemon=True).start()
    _tokenise = lambda rows: tokenise(job, rows)  # noqa: E731


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _tokenise_in_worker(rows: Sequence[RawRow]) -> TokenisedBatch:
    return _tokenise(rows)
