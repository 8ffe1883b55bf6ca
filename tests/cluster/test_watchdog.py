"""Which ranks the heartbeat monitor blames, by heartbeats and a clock that the test moves."""

import os
import subprocess
import sys

from bigmix.cluster.heartbeat import (
    Heartbeat,
    HeartbeatMonitor,
    Limits,
    ShutdownReason,
    heartbeat_of,
    shutdown_reason_of,
    to_text,
)
from bigmix.cluster.processes import has_ended, identity, parent_of

LIMITS = Limits(dead_s=20, hang_s=60)


class Time:
    """A clock, and the heartbeats that ranks write once a second."""

    def __init__(self, num_ranks):
        self.now = 1000.0
        self.monitor = HeartbeatMonitor(range(num_ranks), LIMITS, lambda: self.now)
        self.serial = 0

    def pass_(self, seconds, counts, left=()):
        """Let ranks write heartbeats with these numbers of activities; None: no heartbeat."""
        for _ in range(seconds):
            self.now += 1
            self.serial += 1
            heartbeats = {
                rank: Heartbeat(
                    serial=self.serial,
                    num_activities=count,
                    activity=f"part {count}",
                    has_left=rank in left,
                )
                for rank, count in enumerate(counts)
                if count is not None
            }
            self.monitor.update(heartbeats)


def test_ranks_that_beat_and_move_are_left_alone():
    time = Time(3)
    for count in range(200):
        time.pass_(1, [count, count // 50, count // 50])
        assert time.monitor.silence() is None and time.monitor.hang() is None


def test_a_rank_without_a_heartbeat_is_dead_after_the_limit_and_not_before():
    time = Time(3)
    time.pass_(5, [1, 1, 1])
    time.pass_(20, [2, None, 2])
    assert time.monitor.silence() is None
    time.pass_(1, [2, None, 2])
    reason = time.monitor.silence()
    assert reason.silent == [1] and reason.code == 1
    assert reason.text.startswith("rank 1 gave no sign of life for 20 s, the last at part 1;")


def test_a_rank_that_never_sends_a_heartbeat_is_dead_too():
    time = Time(2)
    time.pass_(21, [1, None])
    assert time.monitor.silence().silent == [1]


def test_a_rank_that_has_left_is_neither_dead_nor_behind():
    time = Time(2)
    time.pass_(1, [5, 3], left={1})
    time.pass_(59, [5, None])
    assert time.monitor.silence() is None and time.monitor.hang() is None
    time.pass_(3, [5, None])
    assert "rank 0 at part 5" in time.monitor.hang().text and time.monitor.has_left(1)


def test_in_a_hang_the_ranks_with_the_least_progress_are_blamed():
    time = Time(4)
    time.pass_(1, [7, 6, 7, 6])
    time.pass_(60, [7, 6, 7, 6])
    assert time.monitor.hang() is None
    time.pass_(1, [7, 6, 7, 6])
    assert "for 60 s: ranks 1, 3 at part 6; ranks 0, 2 at part 7" in time.monitor.hang().text
    time.pass_(1, [7, 6, 8, 6])
    assert time.monitor.hang() is None


def test_of_ranks_at_the_same_activity_the_frozen_one_is_blamed():
    time = Time(3)
    time.pass_(50, [7, 7, 7])
    time.pass_(12, [7, None, 7])
    assert "rank 1 at part 7, frozen; ranks 0, 2 at part 7" in time.monitor.hang().text


def test_a_message_names_a_few_of_many_ranks():
    time = Time(100)
    time.pass_(62, [1] * 100)
    assert "ranks 0, 1, 2, 3, 4, 5, 6, 7 and 92 more at part 1" in time.monitor.hang().text


def test_what_is_written_to_the_store_is_read_back():
    heartbeat = Heartbeat(serial=3, num_activities=2, activity='a "quoted" thing', has_left=True)
    assert heartbeat_of(to_text(heartbeat)) == heartbeat
    assert heartbeat_of("").num_activities == 0
    reason = ShutdownReason(text="two\nlines", code=75, silent=[4], is_error=True)
    assert shutdown_reason_of(to_text(reason)) == reason


def test_processes_are_known_by_their_ids():
    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    assert not has_ended(child.pid) and parent_of(child.pid) == os.getpid()
    child.kill()
    os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
    assert has_ended(child.pid), "it has ended, though its parent has not waited for it"
    child.wait()
    assert has_ended(child.pid) and identity().process == os.getpid()
