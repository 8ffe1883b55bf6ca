"""The batch files on a real Slurm cluster of two nodes.

Whatever happens to a job, its run ends as one that was never disturbed.
"""

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
from support.corpora import generated_texts
from support.ranks import ROOT
from support.runs import RECIPE, end, lines, recipe_with_sources, start, weights
from support.slurm import Slurm, cluster, what_is_missing

from bigmix.commands.main import main
from bigmix.data.shards.manifest import read_manifest

PATIENCE_S = 150
STEPS = 60
LONG = [f"budget.steps={STEPS}", "checkpoint.every=10", "evaluate.every=20"]
TRAINING = ["--nodes=2", "--ntasks-per-node=1", "--gpus-per-node=1", "--cpus-per-task=1"]
ENDED = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL")
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def slurm(tmp_path_factory):
    reason = what_is_missing()
    if reason is not None:
        if os.environ.get("BIGMIX_NEEDS_SLURM") == "1":
            pytest.fail(f"BIGMIX_NEEDS_SLURM is 1, and {reason}")
        pytest.skip(reason)
    with cluster(tmp_path_factory.mktemp("cluster")) as running:
        yield running


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return recipe_with_sources(tmp_path_factory.mktemp("slurm"))


@pytest.fixture(scope="module")
def undisturbed(data):
    """The same run on two ranks without Slurm."""
    codes, output = end(start(data, 2, "output=undisturbed", *LONG))
    assert codes == [0, 0], output
    return data / "undisturbed"


@dataclass(frozen=True, kw_only=True, slots=True)
class Job:
    """A job that was submitted from `folder`."""

    slurm: Slurm
    folder: Path
    number: str

    @property
    def log(self) -> str:
        path = self.folder / f"slurm-{self.number}.log"
        return path.read_text() if path.exists() else ""

    @property
    def state(self) -> tuple[str, int]:
        found = self.slurm.job(self.number)
        return found["JobState"], int(found["Restarts"])

    def wait(self, is_so: Callable[[], bool], what: str) -> None:
        """Wait until a condition holds; fails with the job's log if the job ends before."""
        until = time.monotonic() + PATIENCE_S
        while not is_so():
            can_happen = self.state[0] not in ENDED and time.monotonic() < until
            assert can_happen, f"{what} did not happen: {self.state}\n{self.log}"
            time.sleep(0.4)

    def end(self) -> tuple[str, str]:
        """The last state of the job and its exit code, once it has ended."""
        until = time.monotonic() + PATIENCE_S
        while self.state[0] not in ENDED:
            assert time.monotonic() < until, f"the job does not end: {self.state}\n{self.log}"
            time.sleep(0.4)
        found = self.slurm.job(self.number)
        return found["JobState"], found["ExitCode"].partition(":")[0]

    def restart(self, num_restarts: int) -> None:
        """Wait until the job is requeued, and start it without the wait of two minutes."""
        self.wait(lambda: self.state == ("PENDING", num_restarts), f"restart {num_restarts}")
        # A job that starts within a second of its requeue is confused with the one that has ended.
        self.slurm.run("scontrol", "update", f"JobId={self.number}", "StartTime=now+2")


def submit(slurm, folder, file, *arguments, options=(), **environment) -> Job:
    own = {
        "BIGMIX_ROOT": str(ROOT),
        "PYTHON": sys.executable,
        "BIGMIX_LOCAL": str(folder / "local"),
        "DS_ACCELERATOR": "cpu",
    }
    done = subprocess.run(
        ["sbatch", "--parsable", *options, str(ROOT / "slurm" / file), *arguments],
        cwd=folder,
        env=slurm.environment | own | environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return Job(slurm=slurm, folder=folder, number=done.stdout.strip())


def train(slurm, data, *arguments, **environment) -> Job:
    return submit(slurm, data, "train.sbatch", *arguments, options=TRAINING, **environment)


def wait_until_nothing_is_queued(slurm):
    until = time.monotonic() + PATIENCE_S
    while queue := slurm.run("squeue", "--noheader"):
        assert time.monotonic() < until, queue
        time.sleep(0.2)


def newest_step(folder):
    latest = folder / "checkpoints/latest"
    return int(latest.read_text().removeprefix("step-")) if latest.exists() else 0


def pid_of_rank(job, rank):
    """The Python process of a task, found by what Slurm has set in its environment; None if there
    is none.
    """
    wanted = {f"SLURM_JOB_ID={job.number}".encode(), f"SLURM_PROCID={rank}".encode()}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            command = (folder / "cmdline").read_bytes().split(b"\0")
            environment = set((folder / "environ").read_bytes().split(b"\0"))
        except OSError:
            continue  # it has just ended
        is_training = command[0] == sys.executable.encode() and b"recipe.yaml" in command
        if is_training and wanted <= environment:
            return int(folder.name)
    return None


def stop_by_the_batch_shell(job):
    job.slurm.run("scancel", "--signal=USR1", "--batch", job.number)


def stop_by_the_ranks(job):
    job.slurm.run("scancel", "--signal=USR1", job.number)


def kill_a_rank(job):
    os.kill(pid_of_rank(job, 1), signal.SIGKILL)


def preempt(job):
    urgent = ["--partition=urgent", "--nodes=2", "--exclusive", "--output=/dev/null", "--wrap=true"]
    job.slurm.run("sbatch", *urgent)


def test_a_job_that_is_stopped_killed_and_preempted_ends_like_an_undisturbed_run(
    slurm, data, undisturbed
):
    job = train(slurm, data, "recipe.yaml", "output=disturbed", *LONG)
    events = [stop_by_the_batch_shell, stop_by_the_ranks, kill_a_rank, preempt]
    for number, event in enumerate(events, 1):
        job.wait(lambda at=10 * number: newest_step(data / "disturbed") >= at, event.__name__)
        event(job)
        job.restart(number)
    assert job.end() == ("COMPLETED", "0"), job.log
    requeued = [line for line in job.log.splitlines() if line.startswith("slurm: requeued")]
    assert ["stopped on request" in line for line in requeued] == [True, True, False, True], job.log
    assert re.search("requeued: failed with (137|1), for the first time at step-0000", requeued[2])
    assert lines(data / "disturbed") == lines(undisturbed)
    assert weights(data / "disturbed") == weights(undisturbed)
    assert (
        f"folder: {data}/local/bigmix-{job.number}/shards"
        in (data / "disturbed/recipe.yaml").read_text()
    )
    assert list((data / "local").iterdir()) == []


def test_bad_input_is_not_tried_again(slurm, data):
    recipe = train(slurm, data, "recipe.yaml", "output=bad", "train.sead=1")
    assert recipe.end() == ("FAILED", "2")
    assert "train.sead is not a setting" in recipe.log
    assert "not requeued: the recipe is bad" in recipe.log
    arguments = ["recipe.yaml", "output=bad", "sources.web.path=nowhere"]
    source = train(slurm, data, *arguments, PYTHON=f"env {sys.executable}")
    assert source.end() == ("FAILED", "2")
    assert "nowhere is not a prepared source" in source.log
    assert "not requeued: the input is bad" in source.log
    assert source.state[1] == 0


def test_a_run_that_fails_twice_at_the_same_point_is_given_up(slurm, data):
    job = train(slurm, data, "recipe.yaml", f"output={data}/given-up")
    for restarts in (1, 2):
        job.wait(lambda: pid_of_rank(job, 1) is not None, "the start of rank 1")
        kill_a_rank(job)
        if restarts == 1:
            job.restart(restarts)
    assert job.end()[0] == "FAILED", job.log
    assert re.search(
        "slurm: requeued: failed with .*, for the first time at the beginning", job.log
    )
    assert re.search("not requeued: failed with .*, 2 times in a row at the beginning", job.log)


def test_a_job_is_restarted_at_most_as_often_as_allowed(slurm, data):
    arguments = ["recipe.yaml", f"output={data}/restarted", "checkpoint.max_minutes=0.0001"]
    job = train(slurm, data, *arguments, MAX_RESTARTS="0")
    assert job.end() == ("FAILED", "75"), job.log
    assert "it was restarted 0 times and MAX_RESTARTS is 0" in job.log
    assert newest_step(data / "restarted") == 1


def test_a_job_that_is_cancelled_is_not_requeued(slurm, data):
    job = train(slurm, data, "recipe.yaml", "output=cancelled")
    job.wait(lambda: pid_of_rank(job, 1) is not None, "the start of rank 1")
    slurm.run("scancel", job.number)
    assert job.end()[0] == "CANCELLED"
    wait_until_nothing_is_queued(slurm)
    # Whether the batch shell can still report it is up to Slurm, which ends it as well.
    assert not re.search(r"^slurm: requeued", job.log, re.MULTILINE)


@pytest.fixture
def texts(tmp_path):
    rows = [json.dumps({"text": text}) + "\n" for text in generated_texts(900)]
    (tmp_path / "texts.jsonl").write_text("".join(rows))
    return tmp_path


def preparing(tiny_tokenizer, output):
    return [
        "texts.jsonl",
        "--tokenizer",
        str(tiny_tokenizer),
        "--shard-tokens",
        "4000",
        "--output",
        output,
    ]


PREPARING = ["--array=1-3", "--cpus-per-task=1"]


def test_an_array_prepares_what_one_process_prepares(slurm, texts, tiny_tokenizer, monkeypatch):
    arguments = preparing(tiny_tokenizer, "array")
    submit(slurm, texts, "prepare.sbatch", *arguments, options=PREPARING)
    monkeypatch.chdir(texts)
    for part in range(1, 4):
        arguments = [*preparing(tiny_tokenizer, "alone"), "--processes", "1"]
        assert main(["prepare", *arguments, "--part", f"{part}/3"]) == 0
    assert main(["prepare", "--merge", "--output", "alone"]) == 0
    wait_until_nothing_is_queued(slurm)
    logs = "".join(path.read_text() for path in texts.glob("slurm-*.log"))
    assert (texts / "array/manifest.json").exists(), logs
    found, expected = (read_manifest(str(texts / name)) for name in ("array", "alone"))
    assert found == expected and found.documents == 900
    assert logs.count("follows when all of the array have ended") == 1


def test_a_part_that_fails_is_named_by_the_merge(slurm, texts, tiny_tokenizer):
    with (texts / "texts.jsonl").open("a") as file:
        file.write("no JSON\n")
    arguments = preparing(tiny_tokenizer, "array")
    submit(slurm, texts, "prepare.sbatch", *arguments, options=PREPARING)
    wait_until_nothing_is_queued(slurm)
    logs = "".join(path.read_text() for path in texts.glob("slurm-*.log"))
    assert "error: part 3/3 is not complete" in logs, logs
    assert not (texts / "array/manifest.json").exists()


def test_recipes_are_trained_and_compared(slurm, data):
    """One of them is stopped while it trains: the task whose job number is that of the whole array,
    which must not be requeued with it.
    """
    two_way = RECIPE.replace("output: run", "output: runs/two-way")
    web = "  web: {path: web, role: replay, share: [[0, 0.5], [8, 0.25]]}\n"
    one_way = RECIPE.replace("output: run", "output: runs/one-way").replace(web, "")
    (data / "two-way.yaml").write_text(two_way)
    (data / "one-way.yaml").write_text(one_way + "held_out: {web: web}\n")
    recipes = ["one-way.yaml", "two-way.yaml"]
    arguments = [*recipes, "budget={task_tokens: 24K}", "--out", "runs/report"]
    array = submit(slurm, data, "compare.sbatch", *arguments, options=["--array=1-2", *TRAINING])
    tasks = [replace(array, number=f"{array.number}_{task}") for task in (1, 2)]
    for task in tasks:
        task.wait(lambda task=task: task.state[0] == "RUNNING", "the start of a task")
    other, of_array = sorted(
        tasks, key=lambda task: slurm.job(task.number)["JobId"] == array.number
    )
    run = data / ("runs/one-way" if of_array is tasks[0] else "runs/two-way")
    of_array.wait(lambda: newest_step(run) >= 2, "a checkpoint")
    assert slurm.job(of_array.number)["JobId"] == array.number
    stop_by_the_batch_shell(of_array)
    of_array.restart(1)
    wait_until_nothing_is_queued(slurm)
    assert [task.log.count("slurm: attempt ") for task in (of_array, other)] == [2, 1], other.log
    logs = "\n".join(path.read_text() for path in data.glob("slurm-*.log"))
    assert (data / "runs/report/index.html").exists(), logs
    summary = json.loads((data / "runs/report/summary.json").read_text())
    assert {"base", "one-way", "two-way"} <= set(summary["runs"])


SWEEP = """
sweep:
  train.lr: [1e-2, 1e-3]
  points: {warm: {train.lr: 1e-3, train.warmup: 0.5}}
"""


def test_the_jobs_of_an_array_divide_a_sweep_among_themselves(slurm, data):
    """The first of the two trains two runs one after the other, as a single job trains all."""
    (data / "sweep.yaml").write_text(RECIPE + SWEEP)
    arguments = ["sweep.yaml", "output=swept", "train.steps=4", "budget.steps=null"]
    submit(slurm, data, "sweep.sbatch", *arguments, options=["--array=1-2", *TRAINING])
    wait_until_nothing_is_queued(slurm)
    logs = "\n".join(path.read_text() for path in data.glob("slurm-*.log"))
    runs = [data / "swept" / point / "seed-0" for point in ("lr-0.01", "lr-1e-3", "warm")]
    assert [newest_step(run) for run in runs] == [4] * 3, logs
    assert all((run / "export").is_dir() for run in runs), logs


def test_a_task_of_a_sweep_counts_the_failures_of_its_own_runs(tmp_path):
    """A failure does not look like a first one because other tasks of the array have trained on."""
    own, other = (tmp_path / f"swept/{name}/seed-0/checkpoints" for name in ("own", "other"))
    for folder in (own, other):
        folder.mkdir(parents=True)
        (folder / "latest").write_text("step-000010\n")
    newest = re.search(
        r"^newest\(\) \{.*?^\}", (ROOT / "slurm/sweep.sbatch").read_text(), re.S | re.M
    )
    script = f"""source {ROOT}/slurm/training.sh; {newest[0]}
        runs=(swept/own/seed-0)
        count_failure swept; echo step-000020 > {other}/latest
        count_failure swept; echo step-000020 > {own}/latest
        count_failure swept"""
    done = subprocess.run(
        ["bash", "-uc", script], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    assert done.stdout.split() == ["1", "2", "1"]


def test_a_container_sees_the_same_paths_as_the_job(tmp_path):
    """The options for pyxis, which is not installed here."""
    script = (
        f"source {ROOT}/slurm/common.sh; LOCAL=/fast/bigmix-7; set_container; printf '%s\\n'"
        ' "${CONTAINER_OPTIONS[@]}"'
    )
    own = {"BIGMIX_ROOT": "/code", "CONTAINER": "image.sqsh", "CONTAINER_MOUNTS": "/data:/data:ro"}
    done = subprocess.run(
        ["bash", "-uc", script],
        cwd=tmp_path,
        env=os.environ | own,
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.splitlines() == [
        "--container-image=image.sqsh",
        f"--container-workdir={tmp_path}",
        f"--container-mounts={tmp_path}:{tmp_path},/code:/code,"
        "/fast/bigmix-7:/fast/bigmix-7,/data:/data:ro",
    ]
