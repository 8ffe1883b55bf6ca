"""Whole runs by the real launchers: they end well, resume bit for bit, stop on a signal, and refuse
bad input.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
from collections import Counter

import pytest
import yaml
from support.commands import printed
from support.corpora import READING, write_source
from support.ranks import ROOT, run_on_ranks
from support.runs import (
    bare,
    by_deepspeed,
    end,
    lines,
    recipe_with_sources,
    start,
    wait_for,
    weights,
)
from support.servers import web_server
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from bigmix.data.source import read_source
from bigmix.files import try_lock
from bigmix.text.chat_template import PLAIN
from bigmix.text.tokenizer import fingerprint_of


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return recipe_with_sources(tmp_path_factory.mktemp("run"))


@pytest.fixture(scope="module")
def whole(data):
    """An uninterrupted run on two ranks."""
    codes, said = end(start(data, 2, "output=whole"))
    assert codes == [0, 0], said
    return data / "whole", said


def test_a_run_leaves_what_it_should(whole):
    folder, said = whole
    for name in ("recipe.yaml", "metrics.jsonl", "export/config.json", "log/rank-1.log"):
        assert (folder / name).is_file(), name
    assert (folder / "checkpoints/latest").read_text() == "step-000008\n"
    assert "bigmix: two-way training" in said and "step 8/8 100%" in said
    steps = [line for line in lines(folder) if "eval" not in line]
    assert [line["step"] for line in steps] == list(range(1, 9))
    last = steps[-1]
    assert last["total_rows/web"] + last["total_rows/chat"] == 64
    assert last["rows/web"] + last["rows/chat"] == 8
    assert last["share_rows/web"] == pytest.approx(last["total_rows/web"] / 64)
    evaluations = [line for line in lines(folder) if "eval" in line]
    assert [line["step"] for line in evaluations] == [0, 4, 8]
    assert evaluations[0]["forgetting/chat"] == 0
    difference = evaluations[2]["held_out_loss/chat"] - evaluations[0]["held_out_loss/chat"]
    assert evaluations[2]["forgetting/chat"] == pytest.approx(difference)
    assert difference < -0.1


@pytest.mark.slow
def test_the_deepspeed_launcher_trains_the_same_and_needs_no_compiler(whole, data):
    done = subprocess.run(
        by_deepspeed("output=launched"),
        cwd=data,
        env=bare(os.environ | {"PYTHONPATH": str(ROOT)}),
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "bigmix: two-way training" in done.stdout and "step 8/8 100%" in done.stdout
    assert lines(data / "launched") == lines(whole[0])
    assert weights(data / "launched") == weights(whole[0])


OWN_RANK = """
import gc, sys
from bigmix.commands.rank import main
assert main("train", sys.argv[1:]) == 0
print("collects:", gc.isenabled(), "compiler:", "torch._inductor.compile_fx" in sys.modules)
"""


@pytest.mark.slow
def test_a_rank_starts_without_the_compiler_and_collects_garbage_once_it_trains(data):
    words = ["recipe.yaml", "output=own", "budget.steps=1", "evaluate.every=0"]
    done = subprocess.run(
        [sys.executable, "-c", OWN_RANK, *words],
        cwd=data,
        env=bare(os.environ | {"PYTHONPATH": str(ROOT)}),
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert "collects: True compiler: False" in done.stdout, done.stdout + done.stderr


def test_an_export_says_what_it_is_and_speaks(whole):
    folder, said = whole
    evaluation = [line for line in lines(folder) if "eval" in line][-1]
    head, card = (folder / "export/README.md").read_text().removeprefix("---\n").split("---\n", 1)
    assert yaml.safe_load(head)["library_name"] == "transformers"
    assert f"| {evaluation['held_out_loss/chat']:.4f} (" in card
    assert f"| {evaluation['forgetting/chat']:+.4f} " in card
    content = read_source(str(folder.parent / "web"), READING.retry).content
    assert (
        "| web | replay | 0.5 at step 0, 0.25 at step 8 |" in card and f"`{content[:16]}`" in card
    )
    assert (folder / "export/chat_template.jinja").read_text() == PLAIN
    assert "deepspeed launch/train.py recipe.yaml" in card and "rows_per_step: 8" in card
    assert "generation check, from whole/export loaded again: '[" in said


def test_tensorboard_shows_the_run(whole):
    events = EventAccumulator(str(whole[0] / "tensorboard")).Reload()
    tags = events.Tags()["scalars"]
    assert {"loss/web", "gradient_share/chat", "forgetting/chat"} <= set(tags)
    assert [event.step for event in events.Scalars("loss/chat")] == list(range(1, 9))


def test_a_run_that_is_killed_resumes_bit_for_bit(whole, data):
    killed = start(data, 2, "output=killed")
    wait_for(data / "killed/checkpoints/step-000004", killed)
    for process in killed:
        process.send_signal(signal.SIGKILL)
    end(killed)
    assert not (data / "killed/export").exists()
    codes, said = end(start(data, 2, "output=killed"))
    assert codes == [0, 0], said
    assert "going on after step" in said
    assert lines(data / "killed") == lines(whole[0])
    assert weights(data / "killed") == weights(whole[0])


@pytest.mark.slow
def test_a_run_that_is_out_of_time_saves_and_goes_on_to_the_same_end(whole, data):
    codes, said = end(start(data, 2, "output=timed", "checkpoint.max_minutes=0.0001"))
    assert codes == [75, 75], said
    assert "stopped on request after step 1 of 8" in said
    assert (data / "timed/checkpoints/latest").read_text() == "step-000001\n"
    codes, said = end(start(data, 2, "output=timed"))
    assert codes == [0, 0], said
    assert weights(data / "timed") == weights(whole[0])


@pytest.mark.slow
def test_a_run_with_an_average_of_its_weights_resumes_bit_for_bit(whole, data):
    averaged = ["train.ema=0.9", "checkpoint.export_shard_gib=0.00001"]
    codes, said = end(start(data, 2, "output=averaged", *averaged))
    assert codes == [0, 0], said
    assert "evaluated as the average with decay 0.9" in said
    plain, found = lines(whole[0]), lines(data / "averaged")
    # The steps are those of a run without; the evaluations are of the average.
    assert [x for x in found if "eval" not in x] == [x for x in plain if "eval" not in x]
    of_weights, of_average = ([x for x in run if "eval" in x] for run in (plain, found))
    assert of_average[0] == of_weights[0]
    assert of_average[2]["held_out_loss/chat"] != of_weights[2]["held_out_loss/chat"]
    killed = start(data, 2, "output=averaged-killed", *averaged)
    wait_for(data / "averaged-killed/checkpoints/step-000004", killed)
    for process in killed:
        process.send_signal(signal.SIGKILL)
    end(killed)
    codes, said = end(start(data, 2, "output=averaged-killed", *averaged))
    assert codes == [0, 0], said
    assert lines(data / "averaged-killed") == found
    exports = [data / name / "export" for name in ("averaged", "averaged-killed")]
    names = sorted(path.name for path in exports[0].glob("*.safetensors"))
    assert len(names) > 1
    for name in names:
        assert (exports[0] / name).read_bytes() == (exports[1] / name).read_bytes()


ANCHORED = [
    "model={path: base}",
    "reference={sources: {web: 0.5}}",
    "loss={z_loss: 1e-4, entropy: true}",
    "sources.chat.weigh=document",
    "sources.web.path=spoken/web",
    "sources.chat.path=spoken/chat",
    "sources.chat.held_out=spoken/held",
]


@pytest.fixture(scope="module")
def base(whole, data, tiny_tokenizer):
    """A folder with a model and its tokenizer, and sources that are prepared with it."""
    fingerprint = fingerprint_of(str(tiny_tokenizer))
    for name, kind, seed in (("web", "text", 0), ("chat", "chat", 1), ("held", "chat", 1)):
        write_source(data / "spoken" / name, kind, seed=seed, fingerprint=fingerprint)
    shutil.copytree(data / "whole/export", data / "base")
    shutil.copytree(tiny_tokenizer, data / "base", dirs_exist_ok=True)
    return data / "base"


@pytest.mark.slow
def test_a_run_that_stays_near_a_reference_resumes_bit_for_bit(base, data):
    codes, said = end(start(data, 2, "output=anchored", *ANCHORED))
    assert codes == [0, 0], said
    assert "KL to base (0.5 on web)" in said
    # Its 64 positions are too few for any prompt, which is no reason to refuse a run.
    assert "behaviour is not measured: no prompt of the behaviour probe can be put" in said
    steps = [line for line in lines(data / "anchored") if "eval" not in line]
    assert all(line["kl/web"] >= 0 and "kl/chat" not in line for line in steps)
    assert all(0 <= line["accuracy/chat"] <= 1 < line["z/chat"] for line in steps)
    assert all(line["entropy/web"] > 0 for line in steps)
    killed = start(data, 2, "output=anchored-killed", *ANCHORED)
    wait_for(data / "anchored-killed/checkpoints/step-000004", killed)
    for process in killed:
        process.send_signal(signal.SIGKILL)
    end(killed)
    codes, said = end(start(data, 2, "output=anchored-killed", *ANCHORED))
    assert codes == [0, 0], said
    assert lines(data / "anchored-killed") == lines(data / "anchored")
    assert weights(data / "anchored-killed") == weights(data / "anchored")


def test_a_reference_of_another_vocabulary_is_refused_before_anything_is_built(base, data):
    other = data / "other"
    shutil.copytree(base, other)
    config = json.loads((base / "config.json").read_text())
    (other / "config.json").write_text(json.dumps(config | {"vocab_size": 200}))
    overrides = ["output=bad", *ANCHORED, "reference.model=other"]
    codes, text = end(start(data, 1, *overrides))
    assert codes == [2], text
    assert "other has a vocabulary of 200, the model has 96" in text


@pytest.mark.slow
def test_a_signal_to_one_rank_stops_all_after_a_checkpoint(whole, data):
    asked = start(data, 2, "output=asked")
    wait_for(data / "asked/checkpoints/step-000002", asked)
    asked[1].send_signal(signal.SIGTERM)
    codes, said = end(asked)
    assert codes == [75, 75], said
    assert "stopped on request after step" in said
    codes, said = end(start(data, 2, "output=asked"))
    assert codes == [0, 0], said
    assert weights(data / "asked") == weights(whole[0])
    codes, said = end(start(data, 2, "output=asked"))
    assert codes == [0, 0] and "is complete: all 8 steps are done" in said


@pytest.fixture
def remote(data):
    """A server with the sources, and what a recipe says to read them from there."""
    with web_server() as server:
        for path in (path for name in ("web", "chat", "held") for path in (data / name).iterdir()):
            server.files[f"/{path.relative_to(data)}"] = path.read_bytes()
        paths = [f"sources.{name}.path={server.url}/{name}" for name in ("web", "chat")]
        yield server, [*paths, f"sources.chat.held_out={server.url}/held"]


@pytest.mark.slow
def test_a_run_from_a_server_is_the_same_and_fetches_each_shard_once_for_all_ranks(
    whole, data, remote
):
    server, paths = remote
    server.faults.extend([("status", 503, {}), ("truncate", 90)])
    codes, said = end(start(data, 2, "output=remote", "cache.folder=cache", *paths))
    assert codes == [0, 0], said
    assert lines(data / "remote") == lines(whole[0])
    assert weights(data / "remote") == weights(whole[0])
    whole_answers = Counter(path for path, span, _ in server.requests if span is None)
    shards = {path: count for path, count in whole_answers.items() if path.endswith(".tar")}
    assert len(shards) == 5 - 1 and set(shards.values()) == {1}  # the held-out one is one of chat's


@pytest.mark.slow
def test_a_shard_that_vanishes_ends_the_run_and_nothing_hangs(data, remote):
    server, paths = remote
    gone = f"{server.url}/chat/shard-00001.tar"
    del server.files["/chat/shard-00001.tar"]
    codes, said = end(start(data, 1, "output=gone", "cache.folder=fresh", *paths))
    assert codes == [1], said
    assert f"cannot be used: there is no file {gone}" in said and "Traceback" not in said
    assert said.count("stopped: ") == 1


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["train.sead=1"], "train.sead is not a setting"),
        (["sources.web.path=nowhere"], "nowhere is not a prepared source"),
        (["rows_per_step=9"], "rows_per_step is 9, must be a multiple"),
        (["sequence_length=65"], "sequence_length is 65, the model has positions for 64"),
        (["model.config.vocab_size=50"], "prepared with a vocabulary of 96, the model has 50"),
    ],
)
def test_bad_input_ends_with_2_before_anything_is_written(data, overrides, said):
    codes, text = end(start(data, 1, "output=bad", "train.micro_batch_rows=2", *overrides))
    assert codes == [2], text
    assert f"error: {said}" in text or said in text
    assert "Traceback" not in text
    assert not (data / "bad/metrics.jsonl").exists()


def test_another_tokenizer_than_the_models_is_refused(whole, data, tiny_tokenizer):
    overrides = ["output=bad", "model.config=null", "model.path=whole/export"]
    codes, text = end(start(data, 1, *overrides, f"model.tokenizer={tiny_tokenizer}"))
    assert codes == [2], text
    assert "is not the one that the sources are prepared with" in text


def test_rows_are_named_alike_before_and_in_any_split(data):
    def rows(ranks):
        shown = printed(data, "rows", "recipe.yaml", "--step", "3", "--ranks", ranks)
        return [line.split() for line in shown.splitlines()]

    one, two = rows("1"), rows("2")
    assert [row[2:] for row in one] == [row[2:] for row in two] and len(one) == 8
    assert [row[0] for row in two] == ["0"] * 4 + ["1"] * 4
    assert [row[1] for row in two] == ["0", "0", "1", "1"] * 2


def test_the_folder_of_a_run_is_one_commands(tmp_path):
    with (tmp_path / ".lock").open("w") as other_command:
        assert try_lock(other_command)
        assert run_on_ranks("holds", 2, tmp_path, {"folder": str(tmp_path)}) == [[False, False]] * 2
    assert run_on_ranks("holds", 2, tmp_path, {"folder": str(tmp_path)}) == [[True, True]] * 2
