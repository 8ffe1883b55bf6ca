"""Kills ranks again and again while they save.

`python -m support.kills FOLDER COUNT` prints what it finds after each kill. The ranks are forked
from here, so that the libraries are imported once for all of them.
"""

import json
import os
import random
import shutil
import signal
import sys
import time
from pathlib import Path

import torch
from support.ranks import environment, free_port

from bigmix.cluster.collectives import Cluster
from bigmix.cluster.world import World, world_of
from bigmix.model.engine import join
from bigmix.runs.checkpoints import Position
from bigmix.runs.resume import newest_complete
from bigmix.runs.saver import RetentionPolicy, Saver
from bigmix.runs.state_file import MOMENTS, FlatState, ParameterPiece

ONE = Cluster(World(rank=0, local_rank=0, size=1, local_size=1))


def save_for_ever(folder, cluster):
    """Save states of 6 MB a rank without end, until this process is killed."""
    saver = Saver(
        folder, cluster, RetentionPolicy(newest=2), in_background=True, report=sys.stderr.write
    )
    size, rank = 500_000, cluster.world.rank
    pieces = (ParameterPiece(name="weight", start=rank * size, count=size, offset=0),)
    for step in range(1, 1 << 30):
        moments = {key: torch.full((size,), float(step)) for key in MOMENTS}
        flat = FlatState(pieces=pieces, weights=torch.zeros(size), moments=moments, step=step)
        saver.save(iter([flat]), Position(step=step, report={}))


def fork_rank(folder, rank, port):
    """Fork a rank that saves without end; returns its process id."""
    child = os.fork()
    if child == 0:
        os.environ.update(environment(rank, 2, port))
        save_for_ever(folder, join(world_of(os.environ)))
    return child


def kill_once(folder, draw, all_at_once):
    shutil.rmtree(folder, ignore_errors=True)
    port = free_port()
    ranks = [fork_rank(folder, rank, port) for rank in range(2)]
    until = time.monotonic() + 60
    while not (folder / "latest").exists():
        assert time.monotonic() < until
        time.sleep(0.001)
    time.sleep(draw.random() * 0.1)
    for child in ranks if all_at_once else [draw.choice(ranks), *ranks]:
        os.kill(child, signal.SIGKILL)
        time.sleep(0 if all_at_once else 0.02)
    for child in ranks:
        os.waitpid(child, 0)
    found = newest_complete(folder, ONE)
    return {
        "damaged": found.damaged,
        "newest": found.listed.position.step if found.listed else None,
        "latest": int((folder / "latest").read_text()[5:]),
        "in_a_save": bool(list(folder.glob(".tmp-*"))),
    }


def main():
    folder, count = Path(sys.argv[1]) / "checkpoints", int(sys.argv[2])
    draw = random.Random(7)
    kills = [kill_once(folder, draw, index % 2 == 0) for index in range(count)]
    sys.stdout.write("\n" + json.dumps(kills) + "\n")


if __name__ == "__main__":
    main()
