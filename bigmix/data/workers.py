"""A function and batches go in, its results come out in the order of the batches, from several processes."""

import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import forkserver
from typing import Any, TypeVar

from bigmix.errors import BigmixError

IN_FLIGHT = 3  # batches per process that are read ahead: bounds the memory

Job = TypeVar("Job")
Batch = TypeVar("Batch")
Result = TypeVar("Result")


def in_processes(
    job: Job, work: Callable[[Job, Batch], Result], batches: Iterable[Batch], processes: int
) -> Generator[Result, None, None]:
    """`work(job, batch)` for each batch. To be closed by who does not take all of it: that ends the processes.

    Raises BigmixError where a process dies.
    """
    pool = ProcessPoolExecutor(
        processes, _context(work.__module__), initializer=_begin, initargs=(job,)
    )
    waiting: deque[Future[Result]] = deque()
    try:
        for batch in batches:
            waiting.append(pool.submit(_work, work, batch))
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


def _context(module: str) -> Any:
    """How workers start: not by a fork of this process, whose tokenizer and reader threads a fork would break."""
    if not _has_forkserver():
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([module])  # the imports are paid once, not by each worker
    return context


def start_early(module: str) -> None:
    """Begin the imports that workers of a module need, while this process has other things to do."""
    _context(module)
    if _has_forkserver():
        forkserver.ensure_running()


def _has_forkserver() -> bool:
    return "forkserver" in multiprocessing.get_all_start_methods()


# The job of a worker process, given once: a tokenizer is too large to travel with each batch.
_job: Any


def _begin(job: Any) -> None:
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


def _work(work: Callable[[Any, Batch], Result], batch: Batch) -> Result:
    return work(_job, batch)
