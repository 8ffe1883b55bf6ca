"""Ranks that are killed, frozen, fail or are stopped at any time.

All ranks end soon and report why, and the run resumes from there.
"""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time

import pytest
from support.corpora import write_source
from support.ranks import ROOT, environment, free_port, start_script
from support.runs import (
    LONG,
    bare,
    by_deepspeed,
    catches,
    end,
    lines,
    recipe_with_sources,
    start,
    step_of,
    wait_for,
    wait_until,
    weights,
)
from support.servers import web_server

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = recipe_with_sources(tmp_path_factory.mktemp("faults"))
    write_source(folder / "much", "chat", seed=3, shards=1, documents=500)
    return folder


def wait_for_line(folder, step, processes):
    wait_for(folder / "metrics.jsonl", processes)
    wait_until(lambda: f'"step": {step},' in (folder / "metrics.jsonl").read_text())


def seconds_to_end(processes):
    began = time.monotonic()
    codes, said = end(processes)
    return codes, said, time.monotonic() - began


def start_with_own_overrides(data, *of_ranks):
    """Start the ranks of a run, each with overrides of its own."""
    port, script = free_port(), ROOT / "launch/train.py"
    environments = [bare(environment(rank, len(of_ranks), port)) for rank in range(len(of_ranks))]
    return [
        start_script(script, data, settings, "recipe.yaml", *overrides)
        for settings, overrides in zip(environments, of_ranks, strict=True)
    ]


@pytest.mark.parametrize("victim", [0, 1])
def test_when_a_rank_is_killed_the_other_ends_soon_and_reports_which(data, victim):
    folder, other = data / f"killed-{victim}", 1 - victim
    ranks = start(data, 2, f"output={folder.name}", *LONG)
    wait_for(folder / "checkpoints/step-000020", ranks)
    ranks[victim].kill()
    codes, said, seconds = seconds_to_end(ranks)
    assert codes[other] == 1 and seconds < 15, (codes, said)
    assert re.search(rf"stopped: rank {victim} has died, during [^;]* step \d+", said), said
    stacks = (folder / f"log/stack-rank-{other}.txt").read_text()
    assert "bigmix/train/run.py" in stacks and f"rank {victim} has died" in stacks


@pytest.mark.parametrize(
    ("frozen", "limits", "message"),
    [
        (1, ["health.hang_minutes=0.1"], "no rank has made progress for 6 s: rank 1 at "),
        (1, ["health.dead_after_s=4"], "rank 1 gave no sign of life for 4 s, the last at "),
        (0, ["health.dead_after_s=4"], "rank 0 "),
    ],
)
def test_when_a_rank_is_frozen_the_other_ends_after_the_limit(data, frozen, limits, message):
    folder, other = data / f"frozen-{frozen}-{len(limits[0])}", 1 - frozen
    ranks = start(data, 2, f"output={folder.name}", *LONG, *limits)
    wait_for(folder / "checkpoints/step-000002", ranks)
    ranks[frozen].send_signal(signal.SIGSTOP)
    code = ranks[other].wait(timeout=30)
    ranks[frozen].kill()
    _, said = end(ranks)
    assert code == 1 and f"stopped: {message}" in said, said
    assert "bigmix/train/run.py" in (folder / f"log/stack-rank-{other}.txt").read_text()


def test_one_rank_that_hangs_ends_itself(data):
    with web_server() as server:
        for path in (data / "web").iterdir():
            server.files[f"/web/{path.name}"] = path.read_bytes()
        server.part_wait_s, server.bytes_per_part = 0.5, 64
        ranks = start(
            data,
            1,
            "output=alone",
            "cache.folder=alone-cache",
            f"sources.web.path={server.url}/web",
            "health.hang_minutes=0.1",
            "evaluate.rows=2",
        )
        codes, said = end(ranks)
    assert codes == [1], said
    assert "no rank has made progress for 6 s: rank 0 at " in said
    assert "bigmix/train/run.py" in (data / "alone/log/stack-rank-0.txt").read_text()


def test_an_error_on_one_rank_ends_the_other_with_its_message(data):
    shutil.copytree(data / "held", data / "bad-held")
    common = ("output=failed", *LONG, "evaluate.every=2")
    ranks = start_with_own_overrides(
        data, *([*common, f"sources.chat.held_out={path}"] for path in ("held", "bad-held"))
    )
    wait_for(data / "failed/checkpoints/step-000002", ranks)
    os.truncate(data / "bad-held/shard-00000.tar", 100)
    codes, said = end(ranks)
    assert codes == [1, 1], said
    assert "stopped: rank 1 failed: " in said and "bad-held/shard-00000.tar" in said
    assert said.count("rank 1 failed") == 1 and "Traceback" not in said


def test_a_shard_that_one_rank_cannot_read_ends_all_after_a_checkpoint(data):
    shutil.copytree(data / "web", data / "bad")
    # Shards are opened again when the length of rows changes.
    common = ("output=unread", *LONG, "sequence_length=[[0, 64], [24, 32]]", "checkpoint.every=10")
    ranks = start_with_own_overrides(
        data, *([*common, f"sources.web.path={path}"] for path in ("web", "bad"))
    )
    wait_for(data / "unread/checkpoints/step-000010", ranks)
    for path in (data / "bad").glob("*.tar"):
        path.unlink()
    codes, said = end(ranks)
    assert codes == [1, 1], said
    assert "of web cannot be used: " in said and "bad/shard-000" in said and "Traceback" not in said
    assert (data / "unread/checkpoints/latest").read_text() == "step-000024\n"


def test_a_signal_to_one_rank_reaches_the_other_while_it_waits_for_data(data):
    folder = data / "waiting"
    with web_server() as server:
        for path in (data / "web").iterdir():
            server.files[f"/web/{path.name}"] = path.read_bytes()
        common = (
            "output=waiting",
            "cache.folder=waiting-cache",
            *LONG,
            "checkpoint.every=0",
            "sources.web.share=[[0, 0], [4, 0], [5, 0.5]]",
            "sequence_length=[[0, 64], [4, 32]]",  # rows of one length are read together
        )
        ranks = start_with_own_overrides(
            data, common, [*common, f"sources.web.path={server.url}/web"]
        )
        wait_for(folder / "metrics.jsonl", ranks)
        server.part_wait_s, server.bytes_per_part = 1.0, 16  # a shard takes an hour
        wait_for_line(folder, 4, ranks)
        time.sleep(2)
        ranks[0].send_signal(signal.SIGUSR1)
        codes, said, seconds = seconds_to_end(ranks)
    assert codes == [75, 75] and seconds < 10, (seconds, said)
    assert "stopped on request after step 4 of" in said and step_of(folder) == 4
    assert max(line["step"] for line in lines(folder)) == 4


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT])
@pytest.mark.parametrize("after_s", [0.0, 1.5])
def test_a_signal_during_start_up_ends_at_once(data, number, after_s):
    rank = subprocess.Popen(
        [sys.executable, str(ROOT / "launch/train.py"), "recipe.yaml", "output=early"],
        cwd=data,
        env=bare(environment(0, 1, free_port())),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    wait_until(lambda: catches(rank, signal.SIGUSR2))  # the last handler
    time.sleep(after_s)
    rank.send_signal(number)
    codes, said, seconds = seconds_to_end([rank])
    assert codes == [75] and seconds < 5, said
    assert f"stopped: requested by {number.name} on rank 0" in said
    assert "nothing was trained since the last checkpoint" in said


def test_a_signal_in_an_evaluation_leaves_it_out_and_the_next_start_does_it_first(data):
    much = ("sources.chat.held_out=much", "checkpoint.every=0")
    codes, said = end(start(data, 2, "output=whole", *much))
    assert codes == [0, 0], said
    folder = data / "evaluating"
    for step in (0, 4, 8):
        ranks = start(data, 2, "output=evaluating", *much)
        if step:
            wait_for_line(folder, step, ranks)
        else:
            wait_for(folder / "metrics.jsonl", ranks)
        time.sleep(0.3)
        ranks[1].send_signal(signal.SIGTERM)
        codes, said, seconds = seconds_to_end(ranks)
        assert codes == [75, 75] and seconds < 8, (codes, said)
        newest = json.loads(([*(folder / "metrics.jsonl").open(), '{"step": 0}'])[-1 - (step > 0)])
        assert newest["step"] == step and "eval" not in newest
        assert not step or step_of(folder) == step
    codes, said = end(start(data, 2, "output=evaluating", *much))
    assert codes == [0, 0] and "going on after step 8" in said, said
    assert lines(folder) == lines(data / "whole")
    assert weights(folder) == weights(data / "whole")


def test_signals_within_two_seconds_are_one_request(data):
    (rank,) = start(data, 1, "output=twice", *LONG)
    wait_for(data / "twice/checkpoints/step-000002", [rank])
    rank.send_signal(signal.SIGINT)
    time.sleep(0.2)
    rank.send_signal(signal.SIGTERM)
    codes, said = end([rank])
    assert codes == [75], said
    assert f"stopped on request after step {step_of(data / 'twice')} of" in said


def test_a_second_signal_ends_at_once(data):
    folder = data / "second"
    ranks = start(data, 2, "output=second", *LONG)
    wait_for(folder / "checkpoints/step-000002", ranks)
    ranks[1].send_signal(signal.SIGSTOP)
    ranks[0].send_signal(signal.SIGTERM)
    time.sleep(2.5)
    assert ranks[0].poll() is None, "it waits for the frozen rank"
    ranks[0].send_signal(signal.SIGUSR1)
    assert ranks[0].wait(timeout=3) == 128 + signal.SIGUSR1
    ranks[1].kill()
    end(ranks)
    codes, said = end(start(data, 2, "output=second", *LONG, "checkpoint.max_minutes=0.0001"))
    assert codes == [75, 75] and "going on after step" in said, said


def test_ranks_save_and_stop_when_the_first_process_of_deepspeed_is_killed(data):
    folder = data / "orphans"
    runner = subprocess.Popen(
        by_deepspeed("output=orphans", *LONG),
        cwd=data,
        env=bare(os.environ | {"PYTHONPATH": str(ROOT)}),
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    wait_for(folder / "checkpoints/step-000002", [runner])
    runner.kill()
    # The pipe is closed once launch.py and the ranks, which hold it too, have ended.
    said, _ = runner.communicate(timeout=20)
    assert f"stopped on request after step {step_of(folder)} of" in said, said


def test_a_run_stops_in_time_for_the_end_of_its_job(data):
    os.environ["SLURM_JOB_END_TIME"] = str(int(time.time()) + 60)
    try:
        ranks = start(data, 1, "output=job", *LONG, "checkpoint.stop_before_end_minutes=1")
    finally:
        del os.environ["SLURM_JOB_END_TIME"]
    codes, said = end(ranks)
    assert codes == [75] and "stopped on request after step 1 of" in said, said
