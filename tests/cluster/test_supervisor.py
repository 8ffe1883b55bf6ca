"""`bigmix train`: a run that fails is restarted and ends as if it had not, signals are passed on.

A run that cannot make progress is given up.
"""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from support.corpora import write_source
from support.ranks import ROOT
from support.runs import (
    LONG,
    RECIPE,
    bare,
    end,
    lines,
    start,
    step_of,
    wait_for,
    wait_until,
    weights,
)
from support.servers import web_server

from bigmix.cluster.supervisor import LaunchSpec, StopRequests, outcome, supervise

SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)


@pytest.mark.parametrize(
    ("codes", "stop_requested", "code"),
    [
        ([0, 0], False, 0),
        ([0, 0], True, 0),
        ([1, 2], False, 2),
        ([75, 75], False, 75),
        ([75, 0], False, 75),
        ([75, 1], False, 1),
        ([-9, 1], False, 1),
        ([-15, 75], False, 1),
        ([-15, 75], True, 75),
        ([128 + 15, 75], True, 75),
        ([-9, 75], True, 1),
    ],
)
def test_the_exit_code_follows_from_those_of_the_ranks(codes, stop_requested, code):
    assert outcome(dict(enumerate(codes)), stop_requested=stop_requested) == code


@pytest.fixture
def requests():
    before = {number: signal.getsignal(number) for number in SIGNALS}
    yield StopRequests()
    for number, handler in before.items():
        signal.signal(number, handler)


def one_rank(tmp_path, script, max_restarts=3):
    """A rank that runs a script; the file `step` in its folder is its checkpoint."""
    (tmp_path / "step").write_text("0")
    return LaunchSpec(
        start=lambda: [subprocess.Popen([sys.executable, "-c", script], cwd=tmp_path)],
        newest_step=lambda: int((tmp_path / "step").read_text()),
        max_restarts=max_restarts,
    )


STEP = "import pathlib as p; f = p.Path('step'); n = int(f.read_text()) + 1; f.write_text(str(n)); "


def test_a_run_that_makes_progress_each_time_is_restarted_until_it_ends(tmp_path, requests):
    reports = []
    spec = one_rank(tmp_path, STEP + "raise SystemExit(n < 3)")
    assert supervise(spec, requests, reports.append) == 0
    assert reports == [
        "rank 0 ended with 1; restart 1 of 3 from step 1 in 1 s",
        "rank 0 ended with 1; restart 2 of 3 from step 2 in 2 s",
    ]


def test_restarts_are_counted(tmp_path, requests):
    reports = []
    spec = one_rank(tmp_path, STEP + "raise SystemExit(1)", 1)
    assert supervise(spec, requests, reports.append) == 1
    assert reports[-1] == "rank 0 ended with 1; given up after 1 restarts" and len(reports) == 2


@pytest.mark.parametrize("code", [0, 2, 75])
def test_ends_that_are_no_failure_are_passed_on(tmp_path, requests, code):
    reports = []
    spec = one_rank(tmp_path, f"raise SystemExit({code})")
    assert supervise(spec, requests, reports.append) == code
    assert reports == []


@pytest.mark.parametrize(("code", "outcome"), [(75, 75), (2, 2), (1, 1), (0, 1)])
def test_a_rank_that_waits_for_one_that_has_ended_is_ended_too(
    requests, monkeypatch, code, outcome
):
    monkeypatch.setattr("bigmix.cluster.supervisor._GRACE_S", 0.5)
    scripts = [f"raise SystemExit({code})", "import time; time.sleep(60)"]
    spec = LaunchSpec(
        start=lambda: [subprocess.Popen([sys.executable, "-c", script]) for script in scripts],
        newest_step=lambda: 0,
        max_restarts=0,
    )
    assert supervise(spec, requests, lambda _: None) == outcome


def test_a_rank_that_was_killed_is_named_before_one_that_failed_because_of_it(
    requests, monkeypatch
):
    monkeypatch.setattr("bigmix.cluster.supervisor._CHECK_S", 1.0)  # both end between two checks
    scripts = ["raise SystemExit(1)", "import os; os.kill(os.getpid(), 9)"]
    reports = []
    spec = LaunchSpec(
        start=lambda: [subprocess.Popen([sys.executable, "-c", script]) for script in scripts],
        newest_step=lambda: 0,
        max_restarts=0,
    )
    assert supervise(spec, requests, reports.append) == 1
    assert reports == ["rank 1 was ended by SIGKILL; given up after 0 restarts"]


def test_a_stop_request_ends_the_wait_before_a_restart(tmp_path, requests):
    def report(line):
        signal.raise_signal(signal.SIGTERM)

    began = time.monotonic()
    assert supervise(one_rank(tmp_path, "raise SystemExit(1)"), requests, report) == 75
    assert time.monotonic() - began < 1


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("supervised")
    for name, kind, seed in (("web", "text", 0), ("chat", "chat", 1), ("held", "chat", 1)):
        write_source(folder / name, kind, seed=seed)
    (folder / "recipe.yaml").write_text(RECIPE)
    return folder


def supervised(data, *arguments, env=None):
    return subprocess.Popen(
        [sys.executable, "-m", "bigmix.commands", "train", "recipe.yaml", *arguments],
        cwd=data,
        text=True,
        env=bare({"PYTHONPATH": str(ROOT)} | (env or {})),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )


def ranks_of(supervisor):
    children = Path(f"/proc/{supervisor.pid}/task/{supervisor.pid}/children").read_text().split()
    return [int(child) for child in children]


@pytest.mark.slow
def test_a_run_whose_rank_is_killed_resumes_to_the_same_end(data):
    codes, output = end(start(data, 2, "output=whole"))
    assert codes == [0, 0], output
    run = supervised(data, "output=again", "--ranks", "2")
    wait_for(data / "again/checkpoints/step-000002", [run])
    os.kill(ranks_of(run)[1], signal.SIGKILL)
    codes, output = end([run])
    assert codes == [0], output
    assert re.search(r"rank 1 was ended by SIGKILL; restart 1 of 3 from step \d in 1 s", output), (
        output
    )
    assert "stopped: rank 1 has died" in output and output.count("restart") == 1
    assert lines(data / "again") == lines(data / "whole")
    assert weights(data / "again") == weights(data / "whole")


@pytest.mark.slow
def test_a_run_that_always_fails_is_given_up_after_two_tries(data):
    with web_server() as server:
        for path in (data / "web").iterdir():
            if path.suffix != ".tar":
                server.files[f"/web/{path.name}"] = path.read_bytes()
        paths = (f"sources.web.path={server.url}/web", "cache.folder=cache")
        codes, output = end([supervised(data, "output=failing", *paths)])
    assert codes == [1], output
    assert output.count("restart 1 of 3 from step 0") == 1
    assert "with no checkpoint after that of step 0 since the last restart; given up" in output


@pytest.mark.parametrize("number", SIGNALS)
def test_each_signal_reaches_the_ranks(tmp_path, requests, number):
    """Both ranks wait for it; one sends it to the supervisor, once both have their handlers."""
    script = (
        "import os, pathlib, signal, sys, time\n"
        f"for number in {[*map(int, SIGNALS)]}: signal.signal(number, lambda *_: sys.exit(75))\n"
        "pathlib.Path(sys.argv[1]).touch()\n"
        "while not all(pathlib.Path(n).exists() for n in '01'): time.sleep(0.01)\n"
        f"if sys.argv[1] == '0': os.kill(os.getppid(), {int(number)})\n"
        "time.sleep(60)"
    )
    spec = LaunchSpec(
        start=lambda: [
            subprocess.Popen([sys.executable, "-c", script, rank], cwd=tmp_path) for rank in "01"
        ],
        newest_step=lambda: 0,
        max_restarts=0,
    )
    assert supervise(spec, requests, lambda _: None) == 75


@pytest.mark.slow
def test_a_signal_stops_the_run_after_a_checkpoint(data):
    folder = data / "stopped"
    run = supervised(data, f"output={folder.name}", "--ranks", "2", *LONG)
    wait_for(folder / "checkpoints/step-000002", [run])
    run.send_signal(signal.SIGUSR1)
    codes, output = end([run])
    assert codes == [75], output
    assert (
        f"stopped on request after step {step_of(folder)} of" in output and "restart" not in output
    )


@pytest.mark.slow
def test_no_rank_outlives_its_supervisor(data):
    folder = data / "orphans"
    run = supervised(data, "output=orphans", "--ranks", "2", *LONG)
    wait_for(folder / "checkpoints/step-000002", [run])
    ranks = ranks_of(run)
    run.kill()
    wait_until(lambda: not any(Path(f"/proc/{rank}").exists() for rank in ranks), within_s=20)
    output, _ = run.communicate()
    assert f"stopped on request after step {step_of(folder)} of" in output


@pytest.mark.slow
def test_bad_input_is_reported_once_and_not_tried_again(data):
    codes, output = end([supervised(data, "train.sead=1")])
    assert codes == [2] and output.count("train.sead is not a setting") == 1
    codes, output = end([supervised(data, "output=bad", "rows_per_step=9", "--ranks", "2")])
    assert codes == [2] and output.count("rows_per_step is 9") == 1 and "restart" not in output
    codes, output = end([supervised(data, "output=bad", "--ranks", "0")])
    assert codes == [2] and "--ranks is 0" in output
