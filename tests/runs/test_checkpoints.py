"""Checkpoints are complete or absent, and hold the same state for any number of ranks."""

import json
import os
import shutil
import subprocess
import sys

import pytest
from safetensors.torch import load_file
from support.disks import small_disk
from support.ranks import environment, run_on_ranks

from bigmix.cluster.collectives import Cluster
from bigmix.cluster.world import World
from bigmix.runs.checkpoints import folders, other_versions, prune, put_aside
from bigmix.runs.resume import newest_complete

ONE = Cluster(World(rank=0, local_rank=0, size=1, local_size=1))
WHOLE_PARAMETERS = {"stage": 3, "stage3_param_persistence_threshold": 100}
SMALL_GROUPS = {"stage": 3, "sub_group_size": 3000, "stage3_param_persistence_threshold": 0}
STAGES = {
    "zero3": SMALL_GROUPS,
    "zero3 with small parameters whole": WHOLE_PARAMETERS,
    "zero2": {"stage": 2},
    "zero1": {"stage": 1},
}


def on_ranks(function, ranks, folder, **arguments):
    arguments["folder"] = str(folder / "checkpoints")
    return run_on_ranks(function, ranks, folder, arguments, module="support.workers.checkpoints")


def ds_config(folder, name):
    path = folder / f"{name}.json"
    keys = {
        "data_types": {"grad_accum_dtype": "fp32"},
        "zero_force_ds_cpu_optimizer": False,
        "zero_optimization": {"overlap_comm": False, **STAGES[name]},
    }
    path.write_text(json.dumps(keys))
    return str(path)


@pytest.mark.parametrize(
    ("stage", "dtype", "family", "wrote", "reads"),
    [
        ("zero3", "fp32", "llama", 2, [2, 1]),
        pytest.param("zero3", "fp32", "llama", 1, [3], marks=pytest.mark.slow),
        pytest.param("zero3", "bf16", "qwen", 3, [2, 3], marks=pytest.mark.slow),
        pytest.param(
            "zero3 with small parameters whole", "bf16", "gemma", 2, [1, 2], marks=pytest.mark.slow
        ),
        pytest.param("zero2", "fp32", "qwen", 2, [1, 2, 3], marks=pytest.mark.slow),
        pytest.param("zero2", "bf16", "llama", 3, [2, 3], marks=pytest.mark.slow),
        pytest.param("zero1", "fp32", "gpt2", 1, [2], marks=pytest.mark.slow),
        pytest.param("zero1", "bf16", "llama", 2, [1, 2, 3], marks=pytest.mark.slow),
    ],
)
def test_the_state_is_the_same_on_any_number_of_ranks(stage, dtype, family, wrote, reads, tmp_path):
    same = {"family": family, "file": ds_config(tmp_path, stage), "dtype": dtype}
    wanted, *_ = on_ranks("saved", wrote, tmp_path, **same)
    assert wanted["steps"] == [3] * len(wanted["steps"])
    for ranks in reads:
        for found in on_ranks("restored", ranks, tmp_path, **same):
            assert found["state"] == wanted["state"]
            assert set(found["steps"]) == {3} and found["wrote"] == wrote
            assert found["report"] == {"seen": 24}
            if ranks == wrote:
                assert found["sums"] == wanted["sums"]  # bit for bit
            if dtype == "fp32":
                for own, other in zip(found["sums"], wanted["sums"], strict=True):
                    assert own == pytest.approx(other, rel=1e-5)


@pytest.mark.slow
def test_a_zero3_checkpoint_is_read_by_zero1(tmp_path):
    """A checkpoint stores parameters, however a ZeRO stage partitions them."""
    same = {"family": "llama", "dtype": "fp32"}
    wanted, *_ = on_ranks("saved", 1, tmp_path, file=ds_config(tmp_path, "zero3"), **same)
    found, *_ = on_ranks("restored", 1, tmp_path, file=ds_config(tmp_path, "zero1"), **same)
    assert found["state"] == wanted["state"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("stage", "dtype", "family", "wrote", "reads"),
    [
        ("zero3", "fp32", "llama", 2, 1),
        ("zero1", "bf16", "qwen", 1, 2),
        ("zero3", "bf16", "qwen", 1, 2),
        ("zero3 with small parameters whole", "bf16", "llama", 2, 2),
        ("zero2", "fp32", "llama", 2, 1),
        ("zero1", "fp32", "llama", 2, 1),
    ],
)
def test_an_average_is_that_of_the_dense_weights_even_across_a_resume(
    stage, dtype, family, wrote, reads, tmp_path
):
    same = {"family": family, "file": ds_config(tmp_path, stage), "dtype": dtype}
    for ranks, first, last in ((wrote, 1, 4), (reads, 5, 6)):
        for found in on_ranks("averages", ranks, tmp_path, first=first, last=last, **same):
            assert found["fp32"] < 1e-6 < 1e-3 < found["moved"]
            assert found["model"] == 0 and found["exact"]


@pytest.mark.slow
def test_a_run_that_keeps_an_average_and_evaluates_learns_the_same(tmp_path):
    same = {"family": "llama", "file": ds_config(tmp_path, "zero3"), "dtype": "bf16"}
    plain, *_ = on_ranks("saved", 2, tmp_path, **same)
    averaged, *_ = on_ranks("averages", 2, tmp_path, first=1, last=4, **same)
    assert averaged["sums"] == plain["sums"]  # bit for bit


@pytest.mark.slow
def test_an_average_that_joins_later_begins_at_the_weights(tmp_path):
    same = {"family": "llama", "file": ds_config(tmp_path, "zero3"), "dtype": "fp32"}
    on_ranks("saved", 2, tmp_path, **same)
    assert on_ranks("joined", 1, tmp_path, **same) == [0.0]


@pytest.mark.parametrize("in_background", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_the_newest_and_every_third_stay(in_background, tmp_path):
    found = on_ranks("many_saves", 2, tmp_path, in_background=in_background)
    assert [f["said"] for f in found] == [[], []] and found[0]["last"] == 6
    names = {path.name for path in (tmp_path / "checkpoints").iterdir()}
    assert names == {"step-000003", "step-000005", "step-000006", "latest"}
    assert (tmp_path / "checkpoints/latest").read_text() == "step-000006\n"


def test_a_save_that_fails_on_one_rank_harms_nothing(tmp_path):
    for found in on_ranks("saves_that_fail", 2, tmp_path):
        assert found["found"] == [1, 1, 3, 4] and found["failed"] == 1
        (message,) = found["said"]
        assert "the checkpoint of step 2 was not written: rank 1:" in message
        assert message.endswith("the run continues (the last checkpoint is of step 1)")
    assert [p.name for p in folders(tmp_path / "checkpoints")] == [
        "step-000004",
        "step-000003",
        "step-000001",
    ]
    assert not list((tmp_path / "checkpoints").glob(".tmp-*"))


def test_a_disk_without_room_is_noticed_before_a_save_is_begun(tmp_path):
    with small_disk(tmp_path / "disk", 70) as disk:
        for found in on_ranks("saves_on_a_small_disk", 2, disk):
            assert found["found"] == [1, 1, 3] and found["failed"] == 1
            assert "GiB free and a checkpoint needs" in found["said"][0]
        assert not (disk / "checkpoints/step-000002").exists()


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    folder = tmp_path_factory.mktemp("written")
    on_ranks("many_saves", 1, folder, in_background=True)
    return folder / "checkpoints"


@pytest.fixture
def three_checkpoints(written, tmp_path):
    return shutil.copytree(written, tmp_path / "checkpoints")


def flip_a_byte(path):
    raw = bytearray(path.read_bytes())
    raw[len(raw) // 2] ^= 1
    path.write_bytes(bytes(raw))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda path: flip_a_byte(path / "state-00000.safetensors"), "has changed since it was"),
        (lambda path: os.truncate(path / "state-00000.safetensors", 5000), "has 5000 bytes"),
        (lambda path: (path / "state-00000.safetensors").unlink(), "is missing"),
        (lambda path: (path / "checkpoint.json").unlink(), "has no readable checkpoint.json"),
        (lambda path: (path / "checkpoint.json").write_text("{"), "has no readable checkpoint"),
        (lambda path: shutil.rmtree(path), None),
    ],
)
def test_a_damaged_checkpoint_is_named_and_passed_over(three_checkpoints, damage, message):
    damage(three_checkpoints / "step-000006")
    found = newest_complete(three_checkpoints, ONE)
    assert found.listed.path.name == "step-000005" and found.listed.position.step == 5
    if message is None:
        assert found.damaged == ()
    else:
        assert len(found.damaged) == 1
        assert "step-000006" in found.damaged[0] and message in found.damaged[0]
        (aside,) = put_aside(three_checkpoints, after_step=5)
        assert aside.name == "aside-step-000006"
    assert newest_complete(three_checkpoints, ONE).damaged == ()


def test_without_a_complete_checkpoint_there_is_none(three_checkpoints):
    for path in folders(three_checkpoints):
        flip_a_byte(path / "state-00000.safetensors")
    found = newest_complete(three_checkpoints, ONE)
    assert found.listed is None and len(found.damaged) == 3
    assert newest_complete(three_checkpoints / "nowhere", ONE).listed is None


def test_another_version_of_the_format_is_refused(three_checkpoints):
    manifest = three_checkpoints / "step-000005/checkpoint.json"
    manifest.write_text(json.dumps(json.loads(manifest.read_text()) | {"version": 1}))
    (message,) = other_versions(three_checkpoints)
    assert "step-000005 is written in version 1 of the format, this program reads 2" in message


def test_the_files_are_safetensors_that_others_read(three_checkpoints):
    tensors = load_file(three_checkpoints / "step-000006/state-00000.safetensors")
    assert {name.split(".")[1] for name in tensors} == {"weights", "exp_avg", "exp_avg_sq"}


@pytest.mark.slow
def test_a_complete_checkpoint_is_found_after_each_of_fifty_kills(tmp_path):
    """kill -9 of one rank or of all, at random moments, while one checkpoint follows another."""
    command = [sys.executable, "-m", "support.kills", str(tmp_path), "50"]
    done = subprocess.run(
        command, env=environment(0, 1, 0), capture_output=True, text=True, check=True
    )
    kills = json.loads(done.stdout.splitlines()[-1])
    assert len(kills) == 50
    for kill in kills:
        assert kill["damaged"] == [] and kill["newest"] >= kill["latest"] >= 1, kill
    assert sum(kill["in_a_save"] for kill in kills) > 10


def test_other_folders_next_to_checkpoints_are_left_alone(tmp_path):
    for name in ("step-000100", "step-000200", "step-000300", "step-000100-keep", "step-notes"):
        (tmp_path / name).mkdir()
    prune(tmp_path, keep=1, keep_every=0)
    left = sorted(path.name for path in tmp_path.iterdir())
    assert left == ["step-000100-keep", "step-000300", "step-notes"]
    assert [path.name for path in folders(tmp_path)] == ["step-000300"]
