"""Kills ranks again and again while they save: `python -m kills FOLDER COUNT` writes what is found after each kill.

The ranks are forked from here, so that the libraries are imported once for all of them.
"""

import json
import os
import random
import shutil
import signal
import sys
import time
from pathlib import Path

from ranks import environment, free_port
from state_workers import save_for_ever

from bigmix.checkpoint.restore import newest_whole
from bigmix.dist import Cluster
from bigmix.engine import join
from bigmix.world import World, world_of

ONE = Cluster(World(rank=0, local_rank=0, size=1, local_size=1))


def rank_of(folder, rank, port):
    """The process id of a rank that saves without end."""
    child = os.fork()
    if child == 0:
        os.environ.update(environment(rank, 2, port))
        save_for_ever(rank, 2, join(world_of(os.environ)), str(folder))
    return child


def kill_once(folder, draw, everybody):
    shutil.rmtree(folder, ignore_errors=True)
    port = free_port()
    ranks = [rank_of(folder, rank, port) for rank in range(2)]
    until = time.monotonic() + 60
    while not (folder / "latest").exists():
        assert time.monotonic() < until
        time.sleep(0.001)
    time.sleep(draw.random() * 0.1)
    for child in ranks if everybody else [draw.choice(ranks), *ranks]:
        os.kill(child, signal.SIGKILL)
        time.sleep(0 if everybody else 0.02)
    for child in ranks:
        os.waitpid(child, 0)
    found = newest_whole(folder, ONE)
    return {
        "torn": found.torn, "newest": found.listed.position.step if found.listed else None,
        "latest": int((folder / "latest").read_text()[5:]), "in_a_save": bool(list(folder.glob(".tmp-*"))),
    }  # fmt: skip


def main():
    folder, count = Path(sys.argv[1]) / "checkpoints", int(sys.argv[2])
    draw = random.Random(7)
    kills = [kill_once(folder, draw, index % 2 == 0) for index in range(count)]
    sys.stdout.write("\n" + json.dumps(kills) + "\n")


if __name__ == "__main__":
    main()
