"""Fetches shards into the cache in the order in which they will be needed, ahead of need."""

import logging
import queue
import threading
from collections import deque
from collections.abc import Iterable
from concurrent.futures import CancelledError, Future, wait
from dataclasses import dataclass

from bigmix.data.shards.cache import CacheFull, Lease, ShardCache
from bigmix.data.shards.location import shown
from bigmix.data.shards.retry import Stopped, Watch

_JOIN_S = 2.0
_log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, slots=True)
class Needed:
    """A file that will be needed, with what its manifest says of it."""

    url: str
    size: int
    sha256: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Ahead:
    """How far to fetch ahead: at most this many files and bytes, but at least one file; `threads`
    files are fetched at the same time.
    """

    files: int = 4
    bytes: int = 1 << 30
    threads: int = 2


@dataclass(frozen=True, kw_only=True, slots=True)
class _Job:
    needed: Needed
    lease: Future[Lease]


class FetchAhead:
    """Keeps the next files of an order in the cache; `order` may be endless, since it is read only
    as files are taken.

    Files that are ready are leased until they are taken, so the cache must have room for
    `ahead.bytes` of each process besides the files in use. A fault is raised where its file is
    taken, not before.
    """

    def __init__(self, cache: ShardCache, order: Iterable[Needed], ahead: Ahead) -> None:
        self._cache = cache
        self._order = iter(order)
        self._ahead = ahead
        self._next = next(self._order, None)
        self._watch = Watch()
        self._window: deque[_Job] = deque()
        self._lock = threading.Lock()
        self._todo: queue.SimpleQueue[_Job | None] = queue.SimpleQueue()
        # Daemon threads: a stalled transfer must not keep the process from ending.
        self._threads = [
            threading.Thread(target=self._work, name=f"fetch-{index}", daemon=True)
            for index in range(ahead.threads)
        ]
        for thread in self._threads:
            thread.start()
        self._draw()

    def take(self, needed: Needed) -> Lease:
        """The file, once its download has ended; files before it in the order are given up.

        A file that is not among the next ones is fetched at once.
        """
        job = self._advance_to(needed)
        if job is None:
            _log.debug("%s is not among the files that are needed next", shown(needed.url))
            return self._fetch_alone(needed)
        return self._result(job)

    def close(self) -> None:
        """Stop all transfers and return the files that were ready to the cache."""
        self._watch.stop()
        with self._lock:
            self._next = None
            self._give_up(len(self._window))
        for _ in self._threads:
            self._todo.put(None)
        for thread in self._threads:
            thread.join(_JOIN_S)

    def _result(self, job: _Job) -> Lease:
        try:
            return job.lease.result()
        except CacheFull:
            return self._fetch_alone(job.needed)
        except CancelledError as error:
            raise Stopped("fetching ahead was closed") from error

    def _fetch_alone(self, needed: Needed) -> Lease:
        """Fetch a file now; where the cache is full, return the files ahead, which may fill it, and
        try once more.
        """
        try:
            return self._fetch(needed)
        except CacheFull:
            with self._lock:
                under_way = [job.lease for job in self._window if not job.lease.cancel()]
                self._window.clear()
            wait(under_way)
            for lease in under_way:
                _close(lease)
            return self._fetch(needed)

    def _fetch(self, needed: Needed) -> Lease:
        return self._cache.get(
            needed.url, size=needed.size, sha256=needed.sha256, watch=self._watch
        )

    def _advance_to(self, needed: Needed) -> _Job | None:
        with self._lock:
            next_ones = [job.needed for job in self._window]
            job = None
            if needed in next_ones:
                self._give_up(next_ones.index(needed))
                job = self._window.popleft()
        self._draw()
        return job

    def _draw(self) -> None:
        """Start to fetch the next files of the order, as many as may be ahead."""
        with self._lock:
            waiting = sum(job.needed.size for job in self._window)
            while (needed := self._next) is not None:
                waiting += needed.size
                if self._window and (
                    len(self._window) >= self._ahead.files or waiting > self._ahead.bytes
                ):
                    return
                job = _Job(needed=needed, lease=Future())
                self._window.append(job)
                self._todo.put(job)
                self._next = next(self._order, None)

    def _give_up(self, num_jobs: int) -> None:
        for _ in range(num_jobs):
            job = self._window.popleft()
            if not job.lease.cancel():
                job.lease.add_done_callback(_close)

    def _work(self) -> None:
        while (job := self._todo.get()) is not None:
            if not job.lease.set_running_or_notify_cancel():
                continue
            try:
                job.lease.set_result(self._fetch(job.needed))
            except BaseException as error:
                job.lease.set_exception(error)


def _close(done: Future[Lease]) -> None:
    if done.exception() is None:
        done.result().close()
