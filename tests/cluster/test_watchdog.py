"""Which ranks a watchdog blames, by beats and a clock that the test moves."""

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
    """A clock, and the beats that ranks write once a second."""

    def __init__(self, ranks):
        self.now = 1000.0
        self.beats = HeartbeatMonitor(range(ranks), LIMITS, lambda: self.now)
        self.serial = 0

    def pass_(self, seconds, counts, left=()):
        """Ranks beat with these counts; None: not at all."""
        for _ in range(seconds):
            self.now += 1
            self.serial += 1
            told = {
                rank: Heartbeat(
                    serial=self.serial, count=count, doing=f"part {count}", has_left=rank in left
                )
                for rank, count in enumerate(counts)
                if count is not None
            }
            self.beats.take(told)


def test_ranks_that_beat_and_move_are_left_alone():
    time = Time(3)
    for count in range(200):
        time.pass_(1, [count, count // 50, count // 50])
        assert time.beats.silence() is None and time.beats.hang() is None


def test_a_rank_without_a_beat_is_dead_after_the_limit_and_not_before():
    time = Time(3)
    time.pass_(5, [1, 1, 1])
    time.pass_(20, [2, None, 2])
    assert time.beats.silence() is None
    time.pass_(1, [2, None, 2])
    verdict = time.beats.silence()
    assert verdict.silent == [1] and verdict.code == 1
    assert verdict.text.startswith("rank 1 gave no sign of life for 20 s, the last at part 1;")


def test_a_rank_that_never_beats_is_dead_too():
    time = Time(2)
    time.pass_(21, [1, None])
    assert time.beats.silence().silent == [1]


def test_a_rank_that_has_left_is_neither_dead_nor_behind():
    time = Time(2)
    time.pass_(1, [5, 3], left={1})
    time.pass_(59, [5, None])
    assert time.beats.silence() is None and time.beats.hang() is None
    time.pass_(3, [5, None])
    assert "rank 0 at part 5" in time.beats.hang().text and time.beats.has_left(1)


def test_in_a_hang_those_who_came_least_far_are_blamed():
    time = Time(4)
    time.pass_(1, [7, 6, 7, 6])
    time.pass_(60, [7, 6, 7, 6])
    assert time.beats.hang() is None
    time.pass_(1, [7, 6, 7, 6])
    assert "for 60 s: ranks 1, 3 at part 6; ranks 0, 2 at part 7" in time.beats.hang().text
    time.pass_(1, [7, 6, 8, 6])
    assert time.beats.hang() is None


def test_of_ranks_at_the_same_place_the_frozen_one_is_blamed():
    time = Time(3)
    time.pass_(50, [7, 7, 7])
    time.pass_(12, [7, None, 7])
    assert "rank 1 at part 7, frozen; ranks 0, 2 at part 7" in time.beats.hang().text


def test_a_message_names_a_few_of_many_ranks():
    time = Time(100)
    time.pass_(62, [1] * 100)
    assert "ranks 0, 1, 2, 3, 4, 5, 6, 7 and 92 more at part 1" in time.beats.hang().text


def test_what_is_written_on_the_board_is_read_again():
    beat = Heartbeat(serial=3, count=2, doing='a "quoted" thing', has_left=True)
    assert heartbeat_of(to_text(beat)) == beat and heartbeat_of("").count == 0
    verdict = ShutdownReason(text="two\nlines", code=75, silent=[4], is_error=True)
    assert shutdown_reason_of(to_text(verdict)) == verdict


def test_processes_are_known_by_their_numbers():
    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    assert not has_ended(child.pid) and parent_of(child.pid) == os.getpid()
    child.kill()
    os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
    assert has_ended(child.pid), "ended, though nobody has asked for its exit code"
    child.wait()
    assert has_ended(child.pid) and identity().process == os.getpid()
