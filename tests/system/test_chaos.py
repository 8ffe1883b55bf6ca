"""Runs that meet a random fault end as runs without one: a few of those of benchmarks/chaos.py."""

import os
import subprocess
import sys

import pytest
from support.ranks import ROOT

FAULTS = ("kill-in-save", "world-size")


@pytest.mark.slow
def test_runs_survive_faults_at_random_places(tmp_path):
    command = ["benchmarks/chaos.py", "--runs", "2", "--seed", "5", "--faults", *FAULTS]
    done = subprocess.run(
        [sys.executable, *command],
        cwd=ROOT,
        env=os.environ | {"TMPDIR": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=500,
        check=False,
    )
    assert done.returncode == 0, done.stderr + done.stdout
    name, times, survived, *_ = next(
        x for x in done.stdout.splitlines() if x.startswith("all")
    ).split()
    assert (name, times, survived) == ("all", "2", "2")
    assert not list(tmp_path.glob("bigmix-chaos-*"))
