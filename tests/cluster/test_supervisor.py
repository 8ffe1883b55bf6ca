"""`bigmix train`: a run that fails goes on by itself to the same end, one that cannot is given up,
signals are passed on.
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
    ("codes", "is_asked", "code"),
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
def test_one_code_follows_from_those_of_the_ranks(codes, is_asked, code):
    assert outcome(dict(enumerate(codes)), is_asked=is_asked) == code


@pytest.fixture
def requests():
    before = {number: signal.getsignal(number) for number in SIGNALS}
    yield StopRequests()
    for number, handler in before.items():
        signal.signal(number, handler)


def course(tmp_path, script, restarts=3):
    """A rank that runs a script; `step` in its folder is its checkpoint."""
    (tmp_path / "step").write_text("0")
    return LaunchSpec(
        start=lambda: [subprocess.Popen([sys.executable, "-c", script], cwd=tmp_path)],
        newest_step=lambda: int((tmp_path / "step").read_text()),
        restarts=restarts,
    )


STEP = "import pathlib as p; f = p.Path('step'); n = int(f.read_text()) + 1; f.write_text(str(n)); "


def test_a_run_that_comes_further_each_time_is_started_again_until_it_ends(tmp_path, requests):
    said = []
    code = supervise(course(tmp_path, STEP + "raise SystemExit(n < 3)"), requests, said.append)
    assert code == 0
    assert said == [
        "rank 0 ended with 1; restart 1 of 3 from step 1 in 1 s",
        "rank 0 ended with 1; restart 2 of 3 from step 2 in 2 s",
    ]


def test_restarts_are_counted(tmp_path, requests):
    said = []
    assert supervise(course(tmp_path, STEP + "raise SystemExit(1)", 1), requests, said.append) == 1
    assert said[-1] == "rank 0 ended with 1; given up after 1 restarts" and len(said) == 2


@pytest.mark.parametrize("code", [0, 2, 75])
def test_ends_that_are_no_failure_are_passed_on(tmp_path, requests, code):
    said = []
    assert supervise(course(tmp_path, f"raise SystemExit({code})"), requests, said.append) == code
    assert said == []


@pytest.mark.parametrize(("code", "outcome"), [(75, 75), (2, 2), (1, 1), (0, 1)])
def test_a_rank_that_waits_for_one_that_has_ended_is_ended_too(
    requests, monkeypatch, code, outcome
):
    monkeypatch.setattr("bigmix.cluster.supervisor._GRACE_S", 0.5)
    scripts = [f"raise SystemExit({code})", "import time; time.sleep(60)"]
    course = LaunchSpec(
        start=lambda: [subprocess.Popen([sys.executable, "-c", script]) for script in scripts],
        newest_step=lambda: 0,
        restarts=0,
    )
    assert supervise(course, requests, lambda line: None) == outcome


def test_a_rank_that_was_killed_is_named_before_one_that_gave_up_for_want_of_it(
    requests, monkeypatch
):
    monkeypatch.setattr(
        "bigmix.cluster.supervisor._LOOK_EVERY_S", 1.0
    )  # both end between two looks
    scripts = ["raise SystemExit(1)", "import os; os.kill(os.getpid(), 9)"]
    said = []
    course = LaunchSpec(
        start=lambda: [subprocess.Popen([sys.executable, "-c", script]) for script in scripts],
        newest_step=lambda: 0,
        restarts=0,
    )
    assert supervise(course, requests, said.append) == 1
    assert said == ["rank 1 was ended by SIGKILL; given up after 0 restarts"]


def test_a_request_ends_the_wait_before_a_restart(tmp_path, requests):
    def tell(line):
        signal.raise_signal(signal.SIGTERM)

    began = time.monotonic()
    assert supervise(course(tmp_path, "raise SystemExit(1)"), requests, tell) == 75
    assert time.monotonic() - began < 1


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("supervised")
    for name, kind, seed in (("web", "text", 0), ("chat", "chat", 1), ("held", "chat", 1)):
        write_source(folder / name, kind, seed=seed)
    (folder / "recipe.yaml").write_text(RECIPE)
    return folder


def supervised(data, *words, env=None):
    return subprocess.Popen(
        [sys.executable, "-m", "bigmix.commands", "train", "recipe.yaml", *words],
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
def test_a_run_whose_rank_is_killed_goes_on_to_the_same_end(data):
    codes, said = end(start(data, 2, "output=whole"))
    assert codes == [0, 0], said
    run = supervised(data, "output=again", "--ranks", "2")
    wait_for(data / "again/checkpoints/step-000002", [run])
    os.kill(ranks_of(run)[1], signal.SIGKILL)
    codes, said = end([run])
    assert codes == [0], said
    assert re.search(r"rank 1 was ended by SIGKILL; restart 1 of 3 from step \d in 1 s", said), said
    assert "stopped: rank 1 has died" in said and said.count("restart") == 1
    assert lines(data / "again") == lines(data / "whole")
    assert weights(data / "again") == weights(data / "whole")


@pytest.mark.slow
def test_a_run_that_always_fails_is_given_up_after_two_tries(data):
    with web_server() as server:
        for path in (data / "web").iterdir():
            if path.suffix != ".tar":
                server.files[f"/web/{path.name}"] = path.read_bytes()
        paths = (f"sources.web.path={server.url}/web", "cache.folder=cache")
        codes, said = end([supervised(data, "output=failing", *paths)])
    assert codes == [1], said
    assert said.count("restart 1 of 3 from step 0") == 1
    assert "with no checkpoint after that of step 0 since the last restart; given up" in said


@pytest.mark.parametrize("number", SIGNALS)
def test_each_signal_reaches_the_ranks(tmp_path, requests, number):
    """Ranks that wait for any of them; the signal comes from a rank, once both have their
    handlers.
    """
    asked = (
        "import os, pathlib, signal, sys, time\n"
        f"for number in {[*map(int, SIGNALS)]}: signal.signal(number, lambda *_: sys.exit(75))\n"
        "pathlib.Path(sys.argv[1]).touch()\n"
        "while not all(pathlib.Path(n).exists() for n in '01'): time.sleep(0.01)\n"
        f"if sys.argv[1] == '0': os.kill(os.getppid(), {int(number)})\n"
        "time.sleep(60)"
    )
    course = LaunchSpec(
        start=lambda: [
            subprocess.Popen([sys.executable, "-c", asked, rank], cwd=tmp_path) for rank in "01"
        ],
        newest_step=lambda: 0,
        restarts=0,
    )
    assert supervise(course, requests, lambda line: None) == 75


@pytest.mark.slow
def test_a_signal_stops_the_run_well(data):
    folder = data / "asked"
    run = supervised(data, f"output={folder.name}", "--ranks", "2", *LONG)
    wait_for(folder / "checkpoints/step-000002", [run])
    run.send_signal(signal.SIGUSR1)
    codes, said = end([run])
    assert codes == [75], said
    assert f"stopped on request after step {step_of(folder)} of" in said and "restart" not in said


@pytest.mark.slow
def test_no_rank_outlives_its_supervisor(data):
    folder = data / "orphans"
    run = supervised(data, "output=orphans", "--ranks", "2", *LONG)
    wait_for(folder / "checkpoints/step-000002", [run])
    ranks = ranks_of(run)
    run.kill()
    wait_until(lambda: not any(Path(f"/proc/{rank}").exists() for rank in ranks), within_s=20)
    said, _ = run.communicate()
    assert f"stopped on request after step {step_of(folder)} of" in said


@pytest.mark.slow
def test_bad_input_is_told_once_and_not_tried_again(data):
    codes, said = end([supervised(data, "train.sead=1")])
    assert codes == [2] and said.count("train.sead is not a setting") == 1
    codes, said = end([supervised(data, "output=bad", "rows_per_step=9", "--ranks", "2")])
    assert codes == [2] and said.count("rows_per_step is 9") == 1 and "restart" not in said
    codes, said = end([supervised(data, "output=bad", "--ranks", "0")])
    assert codes == [2] and "--ranks is 0" in said
