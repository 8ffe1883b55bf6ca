"""Steps without finite numbers, spikes and bad shards, in runs from start to end.

What is skipped, passed over or replaced is reported, counted, and kept across a resume.
"""

import json
import signal

import pytest
from support.commands import printed
from support.disks import small_disk
from support.ranks import ROOT, environment, free_port, start_script
from support.runs import bare, end, lines, recipe_with_sources, start, wait_for, weights

pytestmark = pytest.mark.slow
# Without dropout, which draws different units on each rank.
STEPS = [
    "model.config.attention_dropout=0",
    "train.steps=12",
    "train.schedule=constant",
    "checkpoint.every=3",
    "evaluate.every=0",
]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return recipe_with_sources(tmp_path_factory.mktemp("recovery"))


def start_faulty(data, ranks, fault, *overrides):
    port = free_port()
    words = (json.dumps(fault), "recipe.yaml", *STEPS, *overrides)
    return [
        start_script(
            ROOT / "tests/support/faulty.py", data, bare(environment(rank, ranks, port)), *words
        )
        for rank in range(ranks)
    ]


def ended(processes, code=0):
    codes, said = end(processes)
    assert codes == [code] * len(codes), said
    return " ".join(said.split())


def nan(*steps, rank=1):
    return {"nan": {"rank": rank, "steps": list(steps)}}


def without(data, output, *steps):
    """The folder of the same run with `train.pass_over` set to some steps from the beginning."""
    passed = f"train.pass_over={list(steps)}"
    said = ended(start(data, 2, *STEPS, f"output={output}", passed))
    assert f"step {steps[0]} is skipped as requested" in said
    return data / output


def test_a_step_without_a_finite_gradient_is_skipped_and_its_rows_are_named(data):
    said = ended(start_faulty(data, 2, nan(5), "output=one"))
    assert "step 5 was skipped on all ranks: the loss is not finite for row" in said
    named = [json.loads(line) for line in (data / "one/log/not-finite.jsonl").open()]
    shown = printed(data, "rows", "recipe.yaml", *STEPS, "--step", "5", "--ranks", "2")
    for row, line in zip(named, shown.splitlines()[-2:], strict=True):
        shard = str(int(row["shard"][6:11]))
        known = [str(row[key]) for key in ("rank", "micro_batch", "source", "epoch")]
        assert line.split()[:6] == [*known, shard, str(row["row"])]
    assert all(row["first_document"] <= row["last_document"] for row in named)
    steps = [line for line in lines(data / "one") if "eval" not in line]
    assert [line["skipped"] for line in steps][3:6] == [0, 1, 1]
    assert steps[-1]["total_rows/web"] + steps[-1]["total_rows/chat"] == 8 * 11
    assert weights(data / "one") == weights(without(data, "one-told", 5))


def test_a_run_without_its_last_checkpoint_is_not_done(data):
    folder = data / "full/checkpoints"
    folder.parent.mkdir()
    with small_disk(folder, 8):
        said = ended(start(data, 1, *STEPS, "output=full"), 1)
    assert "all 12 steps are done, but the checkpoint of the last one could not be written" in said
    first = weights(data / "full")
    ended(start(data, 1, *STEPS, "output=full"))
    assert weights(data / "full") == first and (folder / "step-000012/checkpoint.json").exists()


def test_after_three_skipped_steps_in_a_row_the_run_goes_back_and_passes_over_them(data):
    said = ended(start_faulty(data, 2, nan(5, 6, 7), "output=three"))
    assert (
        "3 steps in a row had no finite gradient: the run goes back to step 3 and skips step"
        " 5, 6, 7" in said
    )
    told = without(data, "three-told", 5, 6, 7)
    assert weights(data / "three") == weights(told)
    same = [{k: v for k, v in line.items() if k != "skipped"} for line in lines(data / "three")]
    assert same == [{k: v for k, v in line.items() if k != "skipped"} for line in lines(told)]
    assert [line["step"] for line in same if line.get("passed_over")] == [5, 6, 7]
    kept = json.loads((data / "three/passed-over.json").read_text())
    assert kept["times"] == [
        {"steps": [5, 6, 7], "reason": "3 steps in a row had no finite gradient"}
    ]
    killed = start_faulty(data, 2, nan(5, 6, 7), "output=three-killed")
    wait_for(data / "three-killed/passed-over.json", killed)
    for process in killed:
        process.send_signal(signal.SIGKILL)
    end(killed)
    ended(start(data, 2, *STEPS, "output=three-killed"))
    assert weights(data / "three-killed") == weights(told)


def test_decisions_on_shares_are_taken_back_with_the_steps(data):
    """A decision falls between the steps, and another on the step of the checkpoint before them,
    which does not hold it yet.
    """
    moving = [
        "sources.web.share={controller: forgetting, limit: 0.1, held_out: [chat]}",
        "evaluate.every=3",
    ]
    said = ended(start_faulty(data, 2, nan(5, 6, 7), "output=moved", *moving))
    assert "the run goes back to step 3" in said and said.count("after step 6: web ") == 2
    passed = "train.pass_over=[5, 6, 7]"
    ended(start(data, 2, *STEPS, "output=moved-told", *moving, passed))
    assert weights(data / "moved") == weights(data / "moved-told")
    same = [
        [{k: v for k, v in line.items() if k != "skipped"} for line in lines(data / output)]
        for output in ("moved", "moved-told")
    ]
    assert same[0] == same[1]
    shares = [line["share/web"] for line in same[0] if "eval" in line]
    assert shares[:4] == sorted(shares[:4], reverse=True) and shares[0] > shares[3]


def test_a_run_that_goes_back_too_often_or_has_no_checkpoint_to_go_back_to_fails(data):
    said = ended(
        start_faulty(data, 1, nan(5, 6, 7, rank=0), "output=two", "health.most_roll_backs=0"), 1
    )
    assert "the run has gone back 0 times already; look at the rows in" in said
    said = ended(start_faulty(data, 2, nan(*range(5, 21)), "output=four", "train.steps=20"), 1)
    assert "the run has gone back 3 times already" in said
    said = ended(start_faulty(data, 1, nan(1, 2, 3, rank=0), "output=none"), 1)
    assert "there is no checkpoint from before that to go back to" in said
    said = ended(start(data, 1, *STEPS, "output=none"))
    assert "step 2 is skipped as requested" in said


def test_a_spike_is_reported_and_if_set_so_passed_over(data):
    spike = {"spike": {"rank": 0, "steps": [28]}}
    long = ["train.steps=32", "health.spike_deviations=8", "train.lr=1e-4", "checkpoint.every=9"]
    said = ended(start_faulty(data, 2, spike, "output=spike", *long))
    assert "the loss of step 28 is" in said and "standard deviations above those" in said
    again = [*long, "health.spikes_roll_back=true"]
    said = ended(start_faulty(data, 2, spike, "output=spike-back", *again))
    assert "the loss leapt up: the run goes back to step 27 and skips step 28" in said
    ended(start(data, 2, *STEPS, "output=spike-told", *long, "train.pass_over=[28]"))
    assert weights(data / "spike-back") == weights(data / "spike-told")


@pytest.fixture
def damaged(tmp_path):
    """The same data, with one shard of each source missing or changed."""
    recipe_with_sources(tmp_path)
    (tmp_path / "chat/shard-00001.tar").unlink()
    raw = bytearray((tmp_path / "web/shard-00001.tar").read_bytes())
    raw[len(raw) // 2] ^= 1
    (tmp_path / "web/shard-00001.tar").write_bytes(bytes(raw))
    return tmp_path


def test_a_run_with_bad_shards_is_refused_unless_it_may_replace_them(damaged):
    said = ended(start(damaged, 1, *STEPS, "output=refused"), 2)
    assert "chat/shard-00001.tar" in said and "web/shard-00001.tar" in said


def test_rows_of_bad_shards_are_replaced_alike_on_all_ranks_and_after_a_resume(damaged):
    replace = [*STEPS, "bad_shards=replace"]
    said = ended(start(damaged, 2, *replace, "output=two"))
    assert "rows of other shards are trained in place of those of shard-00001.tar of chat" in said
    logged = [line for line in lines(damaged / "two") if "eval" not in line]
    assert logged[-1]["total_substituted_rows/chat"] > 0
    assert logged[-1]["total_substituted_rows/chat"] == sum(
        line.get("substituted_rows/chat", 0) for line in logged
    )
    listing = json.loads((damaged / "two/checkpoints/step-000012/checkpoint.json").read_text())
    quarantine = listing["position"]["quarantine"]
    assert set(quarantine) <= {"web", "chat"} and "shard-00001.tar" in quarantine["chat"]
    ended(start(damaged, 1, *replace, "output=alone"))
    alone = [line for line in lines(damaged / "alone") if "eval" not in line]
    for one, two in zip(alone, logged, strict=True):
        assert one.get("loss") == pytest.approx(two.get("loss"), rel=1e-5)
        assert one.get("tokens/chat") == two.get("tokens/chat")
    killed = start(damaged, 2, *replace, "output=killed")
    wait_for(damaged / "killed/checkpoints/step-000006", killed)
    for process in killed:
        process.send_signal(signal.SIGKILL)
    end(killed)
    ended(start(damaged, 2, *replace, "output=killed"))
    assert weights(damaged / "killed") == weights(damaged / "two")


def test_a_run_moves_from_two_ranks_to_one_to_four_and_back(data):
    """The steps have the same rows, and losses differ only by the order of additions."""
    ended(start(data, 2, *STEPS, "output=fixed"))
    for ranks in (2, 1, 4):
        ended(start(data, ranks, *STEPS, "output=moving", "checkpoint.max_minutes=0.0001"), 75)
    said = ended(start(data, 2, *STEPS, "output=moving"))
    assert "written by 4 ranks and read by 2" in said
    fixed, moving = lines(data / "fixed"), lines(data / "moving")
    assert len(fixed) == len(moving)
    for one, other in zip(fixed, moving, strict=True):
        assert one.keys() == other.keys()
        for key, value in one.items():
            counts = ("step", "rows", "tokens", "loss_tokens", "total", "epoch")
            exact = key.startswith(counts) or value is None
            assert other[key] == (value if exact else pytest.approx(value, rel=1e-5, abs=1e-7)), key
