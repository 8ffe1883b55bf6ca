"""Ends all ranks, with the reason and their stacks, where one dies or the run hangs.

Once a second a thread of each rank writes a heartbeat to a store that the ranks share, and reads
there whether to stop (see `StopSignal`) or to shut down. The first rank watches the heartbeats of
all; the ranks of a machine also watch one another's processes.
"""

import contextlib
import faulthandler
import threading
import time
import traceback
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path

from bigmix.cluster.collectives import Cluster, KeyValueStore, StoreLost
from bigmix.cluster.heartbeat import (
    Heartbeat,
    HeartbeatMonitor,
    Limits,
    ShutdownReason,
    heartbeat_of,
    shutdown_reason_of,
    to_text,
)
from bigmix.cluster.processes import Identity, has_ended, identity
from bigmix.cluster.signals import StopSignal, end_process
from bigmix.errors import FAILED, REQUEUE, BigmixError, Interrupted

_ROUND_S = 1.0
_OWN_ERROR_S = 2.0  # for ranks that fail in the same way to raise their own error
_CAUSE_S = 3.0  # to wait for the rank that knows why a collective failed
_LINGER_S = 6.0  # that the first rank stays, so that the others can read why it ends
_STOP, _SHUTDOWN, _HEARTBEAT = "stop", "shutdown", "heartbeat/{}"  # keys of the store


class Watchdog:
    """Watches the ranks of a run until `close` or `fail`; the constructor is a collective."""

    def __init__(
        self, cluster: Cluster, stop_signal: StopSignal, limits: Limits, folder: Path
    ) -> None:
        """`folder` is where each rank writes its stacks.

        From now on signals no longer end the process at once (`StopSignal.defer_signals`).
        """
        self._rank, self._size = cluster.world.rank, cluster.world.size
        self._stop_signal = stop_signal
        self._limits = limits
        self._stacks = _Stacks(folder, self._rank)
        # Replaced as a whole, since two threads use it: how many activities, and the newest.
        self._activity = (0, "setting up")
        self._serial = 0
        self._must_save = False
        self._own_failure: ShutdownReason | None = None
        self._unexpected: BaseException | None = None
        # The first rank watches all, the others watch the first.
        self._watched = range(self._size) if cluster.world.is_first else range(1)
        self._monitor = HeartbeatMonitor(self._watched, limits, time.monotonic)
        self._peers = _peers(cluster.gather(identity()), self._rank)
        keys = [_STOP, _SHUTDOWN, *map(_HEARTBEAT.format, range(self._size))]
        self._store = KeyValueStore(cluster, keys, timedelta(seconds=limits.dead_s))
        self._closing = threading.Event()
        stop_signal.defer_signals()
        self._thread = threading.Thread(target=self._run, name="watchdog", daemon=True)
        self._thread.start()

    def doing(self, text: str) -> None:
        """Report what this rank does from now on.

        All ranks report the same activities in the same order, so that the rank with the fewest is
        behind.
        """
        self._activity = (self._activity[0] + 1, text)

    def must_save(self, yes: bool) -> None:
        """Set whether memory holds training that no checkpoint has.

        Where it does not, a stop request ends all ranks at once.
        """
        self._must_save = yes

    def close(self) -> None:
        """Stop watching: this rank has finished, or all ranks stop in the same way."""
        self._closing.set()
        self._thread.join(timeout=_LINGER_S + self._limits.dead_s)
        self._stacks.close()

    def fail(self, error: BaseException) -> None:
        """Report that this rank ends with an error, and stop watching.

        The other ranks, which may wait for this one for ever, end with the same exit code.
        """
        if isinstance(error, BigmixError):
            message, code = str(error), error.exit_code
        else:
            message, code = f"{type(error).__name__}: {error}", FAILED
            self._unexpected = error
        if not isinstance(error, Interrupted):
            self._own_failure = ShutdownReason(
                text=f"rank {self._rank} failed: {message}", code=code, is_error=True
            )
        self.close()

    def _run(self) -> None:
        try:
            while not self._closing.wait(_ROUND_S):
                if self._monitor.has_left(0) and self._rank:
                    return
                reason = self._check()
                if reason is not None and not self._raises_its_own(reason):
                    self._shut_down(reason)
            if self._unexpected is not None:
                self._wait_for_cause()
            self._leave(self._own_failure)
        except StoreLost as error:
            if not self._closing.is_set() or self._unexpected is not None:
                self._shut_down(self._first_rank_lost(error))

    def _wait_for_cause(self) -> None:
        """Shut down for the reason that another rank finds, if one does.

        Where a rank dies, collectives of the others fail with errors that do not say so.
        """
        until = time.monotonic() + _CAUSE_S
        while time.monotonic() < until:
            reason = self._check()
            if reason is not None:
                self._shut_down(reason)
            time.sleep(_CAUSE_S / 20)

    def _raises_its_own(self, reason: ShutdownReason) -> bool:
        """Whether the main thread of this rank ends with an error too: ranks often fail alike."""
        return reason.is_error and self._closing.wait(_OWN_ERROR_S)

    def _check(self) -> ShutdownReason | None:
        """One round: report, read what the others report, and judge; a reason to end, if any."""
        self._stacks.write_unless_called_again(self._limits.hang_s + self._limits.dead_s)
        self._report()
        if self._must_save and self._stop_signal.is_set():
            self._store.write_once(_STOP, self._stop_signal.reason or "the time limit")
        keys = [_STOP, _SHUTDOWN, *map(_HEARTBEAT.format, self._watched)]
        stop, shutdown, *texts = self._store.read(keys)
        if shutdown:
            return shutdown_reason_of(shutdown)
        if stop:
            self._stop_signal.request_stop(stop)
        self._monitor.update(dict(zip(self._watched, map(heartbeat_of, texts), strict=True)))
        found = self._request() or self._dead_peer() or self._monitor.silence()
        found = found or (self._monitor.hang() if self._rank == 0 else None)
        # All ranks give the reason of the first that has found one.
        return found and shutdown_reason_of(self._store.write_once(_SHUTDOWN, to_text(found)))

    def _report(self, *, has_left: bool = False) -> None:
        self._serial += 1
        num_activities, activity = self._activity
        heartbeat = Heartbeat(
            serial=self._serial,
            num_activities=num_activities,
            activity=activity,
            has_left=has_left,
        )
        self._store.write(_HEARTBEAT.format(self._rank), to_text(heartbeat))

    def _request(self) -> ShutdownReason | None:
        """The reason to end where a stop is requested here and there is nothing to save."""
        if self._stop_signal.reason is None or self._must_save:
            return None
        if not self._stop_signal.owns_process:
            return None  # the loop stops at the next step
        return ShutdownReason(
            text=(
                f"requested by {self._stop_signal.reason} on rank {self._rank} during"
                f" {self._activity[1]}: {self._stop_signal.nothing_lost}"
            ),
            code=REQUEUE,
        )

    def _dead_peer(self) -> ShutdownReason | None:
        """The reason to end where a process of this machine has ended without reporting it."""
        ended = [rank for rank, process in self._peers.items() if has_ended(process)]
        for rank in ended:
            heartbeat = heartbeat_of(self._store.read([_HEARTBEAT.format(rank)])[0])
            if not heartbeat.has_left:
                return _died(rank, self._peers[rank], heartbeat)
        return None

    def _first_rank_lost(self, error: StoreLost) -> ShutdownReason:
        """The reason to end where the first rank and with it the store is gone."""
        heartbeat = self._monitor.newest(0)
        if 0 in self._peers and has_ended(self._peers[0]):
            return _died(0, self._peers[0], heartbeat)
        return ShutdownReason(
            text=(
                f"rank 0 does not answer, its last report was {heartbeat.activity}; its process,"
                " its machine or the network is dead or frozen"
                f" ({str(error).splitlines()[0]})"
            ),
            silent=(0,),
        )

    def _shut_down(self, reason: ShutdownReason) -> None:
        """End this process for a reason; does not return."""
        if reason.code == FAILED:
            self._stacks.write(
                f"{reason.text}\nrank {self._rank}: {self._activity[1]}", self._unexpected
            )
        # Without the first rank there is no store, and this would wait for its answer once more.
        if 0 not in reason.silent:
            with contextlib.suppress(StoreLost):
                self._leave(None, gone=reason.silent)
        own_machine = [rank for rank in (self._rank, *self._peers) if rank not in reason.silent]
        message = None
        if self._rank == min(own_machine, default=self._rank):
            where = f"\nstacks: {self._stacks.pattern}" if reason.code == FAILED else ""
            message = f"stopped: {reason.text}{where}"
        end_process(message, reason.code)

    def _leave(self, reason: ShutdownReason | None, gone: Sequence[int] = ()) -> None:
        """Report that this rank ends, and why.

        The first rank, whose store ends with it, waits until all but those `gone` have left.
        """
        if reason is not None:
            self._store.write_once(_SHUTDOWN, to_text(reason))
        self._report(has_left=True)
        if self._rank:
            return
        others = [_HEARTBEAT.format(rank) for rank in range(1, self._size) if rank not in gone]
        until = time.monotonic() + _LINGER_S
        while time.monotonic() < until:
            if not others or all(heartbeat_of(text).has_left for text in self._store.read(others)):
                return
            time.sleep(0.05)


def _peers(identities: Sequence[Identity], own: int) -> dict[int, int]:
    """The process ids of the other ranks of this machine, by rank."""
    return {
        rank: other.process
        for rank, other in enumerate(identities)
        if rank != own and other.machine == identities[own].machine
    }


def _died(rank: int, process: int, heartbeat: Heartbeat) -> ShutdownReason:
    return ShutdownReason(
        text=(
            f"rank {rank} has died, during {heartbeat.activity}; its process {process} ended"
            " without a message, as after kill -9 or when memory runs out"
        ),
        silent=(rank,),
    )


class _Stacks:
    """The file with the Python stacks of this rank; an empty one is deleted at the end."""

    def __init__(self, folder: Path, rank: int) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._path = folder / f"stack-rank-{rank}.txt"
        self.pattern = folder / "stack-rank-*.txt"
        self._file = self._path.open("a", encoding="utf-8")

    def write(self, heading: str, error: BaseException | None) -> None:
        """Append a heading, the traceback of an error if there is one, and all threads' stacks."""
        self._file.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {heading}\n")
        if error is not None:
            self._file.writelines(traceback.format_exception(error))
        self._file.flush()
        faulthandler.dump_traceback(self._file, all_threads=True)

    def write_unless_called_again(self, within_s: float) -> None:
        """Write the stacks and end the process, unless this is called again in time.

        A thread that needs no Python does it, for when a call holds Python's lock for ever and no
        Python thread can run.
        """
        faulthandler.dump_traceback_later(within_s, exit=True, file=self._file)

    def close(self) -> None:
        """Cancel the timer, and delete the file if it is empty."""
        faulthandler.cancel_dump_traceback_later()
        self._file.close()
        if not self._path.stat().st_size:
            self._path.unlink()
