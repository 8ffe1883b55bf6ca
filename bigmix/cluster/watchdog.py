"""What each rank does now goes in; where one dies or nothing moves any more, all end with the
reason and their stacks.

A thread of each rank writes a beat on the board once a second and reads there whether to stop (see
`StopSignal`) or to end. The first rank looks at all beats; the ranks of a machine also look at one
another's processes.
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

_TICK_S = 1.0
_OWN_WORDS_S = 2.0  # for ranks that fail alike to say so themselves
_CAUSE_S = 3.0  # for whoever knows why a collective failed
_LINGER_S = 6.0  # of the first rank, so that the others can still read why it ends
_STOP, _VERDICT, _BEAT = "stop", "verdict", "beat/{}"


class Watchdog:
    """Watches the ranks of a run from joining to leaving; a collective to make."""

    def __init__(
        self, cluster: Cluster, stop_signal: StopSignal, limits: Limits, folder: Path
    ) -> None:
        """`folder` is where each rank writes its stacks."""
        self._rank, self._size = cluster.world.rank, cluster.world.size
        self._stop_signal = stop_signal
        self._limits = limits
        self._stacks = _Stacks(folder, self._rank)
        self._doing = (0, "setting up")
        self._serial = 0
        self._must_save = False
        self._own: ShutdownReason | None = None
        self._unexpected: BaseException | None = None
        # The first rank has the whole view, the others see to the first.
        self._watched = range(self._size) if cluster.world.is_first else range(1)
        self._beats = HeartbeatMonitor(self._watched, limits, time.monotonic)
        self._peers = _peers(cluster.gather(identity()), self._rank)
        keys = [_STOP, _VERDICT, *map(_BEAT.format, range(self._size))]
        self._board = KeyValueStore(cluster, keys, timedelta(seconds=limits.dead_s))
        self._closing = threading.Event()
        stop_signal.defer_signals()
        self._thread = threading.Thread(target=self._run, name="watchdog", daemon=True)
        self._thread.start()

    def doing(self, text: str) -> None:
        """Tell what this rank does from now on.

        All ranks tell the same in the same order: who told least is behind.
        """
        self._doing = (self._doing[0] + 1, text)

    def must_save(self, yes: bool) -> None:
        """Tell whether memory holds what no checkpoint does; where not, a request to stop ends all
        ranks at once.
        """
        self._must_save = yes

    def close(self) -> None:
        """This rank is through, or all are stopped alike; it is watched no more."""
        self._closing.set()
        self._thread.join(timeout=_LINGER_S + self._limits.dead_s)
        self._stacks.close()

    def fail(self, error: BaseException) -> None:
        """This rank ends with an error; the others, which may wait for it for ever, end with the
        same code.
        """
        if isinstance(error, BigmixError):
            words, code = str(error), error.exit_code
        else:
            words, code = f"{type(error).__name__}: {error}", FAILED
            self._unexpected = error
        if not isinstance(error, Interrupted):
            self._own = ShutdownReason(
                text=f"rank {self._rank} failed: {words}", code=code, is_error=True
            )
        self.close()

    def _run(self) -> None:
        try:
            while not self._closing.wait(_TICK_S):
                if self._beats.has_left(0) and self._rank:
                    return
                self._act_on(self._look())
            if self._unexpected is not None:
                self._seek_cause()
            self._say_goodbye(self._own)
        except StoreLost as error:
            if not self._closing.is_set() or self._unexpected is not None:
                self._end(self._without_first(error))

    def _act_on(self, verdict: ShutdownReason | None) -> None:
        if verdict is not None and not self._says_so_itself(verdict):
            self._end(verdict)

    def _seek_cause(self) -> None:
        """End for the reason that somebody else knows: where a rank dies, the collectives of the
        others fail.
        """
        until = time.monotonic() + _CAUSE_S
        while time.monotonic() < until:
            verdict = self._look()
            if verdict is not None:
                self._end(verdict)
            time.sleep(_CAUSE_S / 20)

    def _says_so_itself(self, verdict: ShutdownReason) -> bool:
        """Whether this rank's main thread ends with an error too: ranks often fail alike."""
        return verdict.is_error and self._closing.wait(_OWN_WORDS_S)

    def _look(self) -> ShutdownReason | None:
        """One round: tell, read, judge."""
        self._stacks.write_unless_called_again(self._limits.hang_s + self._limits.dead_s)
        self._tell()
        if self._must_save and self._stop_signal.is_set():
            self._board.write_once(_STOP, self._stop_signal.reason or "its time is over")
        stop, given, *texts = self._board.read([_STOP, _VERDICT, *map(_BEAT.format, self._watched)])
        if given:
            return shutdown_reason_of(given)
        if stop:
            self._stop_signal.ask(stop)
        self._beats.take(dict(zip(self._watched, map(heartbeat_of, texts), strict=True)))
        found = self._request() or self._dead_peer() or self._beats.silence()
        found = found or (self._beats.hang() if self._rank == 0 else None)
        return found and shutdown_reason_of(self._board.write_once(_VERDICT, to_text(found)))

    def _tell(self, *, has_left: bool = False) -> None:
        self._serial += 1
        count, doing = self._doing
        beat = Heartbeat(serial=self._serial, count=count, doing=doing, has_left=has_left)
        self._board.write(_BEAT.format(self._rank), to_text(beat))

    def _request(self) -> ShutdownReason | None:
        if self._stop_signal.reason is None or self._must_save:
            return None
        if not self._stop_signal.owns_process:
            return None  # the loop stops at the next step
        return ShutdownReason(
            text=(
                f"asked by {self._stop_signal.reason} on rank {self._rank} during {self._doing[1]}:"
                f" {self._stop_signal.nothing_lost}"
            ),
            code=REQUEUE,
        )

    def _dead_peer(self) -> ShutdownReason | None:
        """A verdict where processes of this machine have ended without a word."""
        ended = [rank for rank, process in self._peers.items() if has_ended(process)]
        for rank in ended:
            beat = heartbeat_of(self._board.read([_BEAT.format(rank)])[0])
            if not beat.has_left:
                return _died(rank, self._peers[rank], beat)
        return None

    def _without_first(self, error: StoreLost) -> ShutdownReason:
        """The verdict where the first rank and its board are gone; each rank finds it by itself."""
        beat = self._beats.newest(0)
        if 0 in self._peers and has_ended(self._peers[0]):
            return _died(0, self._peers[0], beat)
        return ShutdownReason(
            text=(
                f"rank 0 does not answer, the last it told was {beat.doing}; its process or machine"
                f" is dead or frozen, or the network is ({str(error).splitlines()[0]})"
            ),
            silent=(0,),
        )

    def _end(self, verdict: ShutdownReason) -> None:
        """End this process as the verdict says; nothing after it runs."""
        if verdict.code == FAILED:
            self._stacks.write(
                f"{verdict.text}\nrank {self._rank}: {self._doing[1]}", self._unexpected
            )
        # Without the first rank nobody keeps the board, and its silence would be waited for again.
        if 0 not in verdict.silent:
            with contextlib.suppress(StoreLost):
                self._say_goodbye(None, but=verdict.silent)
        own_machine = [rank for rank in (self._rank, *self._peers) if rank not in verdict.silent]
        words = None
        if self._rank == min(own_machine, default=self._rank):
            where = f"\nstacks: {self._stacks.pattern}" if verdict.code == FAILED else ""
            words = f"stopped: {verdict.text}{where}"
        end_process(words, verdict.code)

    def _say_goodbye(self, verdict: ShutdownReason | None, but: Sequence[int] = ()) -> None:
        """Tell that this rank leaves, and why; the first rank waits until the others have heard."""
        if verdict is not None:
            self._board.write_once(_VERDICT, to_text(verdict))
        self._tell(has_left=True)
        if self._rank:
            return
        others = [_BEAT.format(rank) for rank in range(1, self._size) if rank not in but]
        until = time.monotonic() + _LINGER_S
        while time.monotonic() < until:
            if not others or all(heartbeat_of(text).has_left for text in self._board.read(others)):
                return
            time.sleep(0.05)


def _peers(identities: Sequence[Identity], own: int) -> dict[int, int]:
    """The process numbers of the other ranks of this machine, by rank."""
    return {
        rank: other.process
        for rank, other in enumerate(identities)
        if rank != own and other.machine == identities[own].machine
    }


def _died(rank: int, process: int, beat: Heartbeat) -> ShutdownReason:
    return ShutdownReason(
        text=(
            f"rank {rank} has died, during {beat.doing}; its process {process} ended without a"
            " word, as after kill -9 or for want of memory"
        ),
        silent=(rank,),
    )


class _Stacks:
    """The file with the Python stacks of this rank; where nothing was written it is taken away
    again.
    """

    def __init__(self, folder: Path, rank: int) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._path = folder / f"stack-rank-{rank}.txt"
        self.pattern = folder / "stack-rank-*.txt"
        self._file = self._path.open("a", encoding="utf-8")

    def write(self, heading: str, error: BaseException | None) -> None:
        """Append the stacks of all threads, and where an error comes from."""
        self._file.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {heading}\n")
        if error is not None:
            self._file.writelines(traceback.format_exception(error))
        self._file.flush()
        faulthandler.dump_traceback(self._file, all_threads=True)

    def write_unless_called_again(self, within_s: float) -> None:
        """Write them and end the process unless this is called again in time.

        A thread without Python does it, for when some call holds Python's lock for ever and no
        thread of ours runs.
        """
        faulthandler.dump_traceback_later(within_s, exit=True, file=self._file)

    def close(self) -> None:
        """Watch no longer."""
        faulthandler.cancel_dump_traceback_later()
        self._file.close()
        if not self._path.stat().st_size:
            self._path.unlink()
