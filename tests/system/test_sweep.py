"""Sweeps: their points have stable names, and each run ends as if it had been trained alone."""

import json
import shutil
import signal

import pytest
import yaml
from support.corpora import write_source
from support.ranks import run_on_ranks
from support.runs import end, lines, start, wait_for, weights
from transformers import AutoConfig, AutoModelForCausalLM

from bigmix.commands.compare.folders import find_result_folders
from bigmix.commands.compare.read import read_runs
from bigmix.commands.main import main
from bigmix.errors import BadInput
from bigmix.files import lock
from bigmix.recipe import load, load_recipe, to_yaml
from bigmix.recipe.sweep import value_name
from bigmix.runs.layout import begin_attempt, fails_again, state_of
from bigmix.text.tokenizer import fingerprint_of
from bigmix.train.inputs import open_inputs

RECIPE = """\
model: {path: base}
sequence_length: 64
rows_per_step: 8
sources:
  web: {path: web, role: replay, share: 0.5, held_out: web-held, whole_below: 20}
  chat: {path: chat, role: task, share: 0.75, held_out: held}
budget: {steps: 4}
train: {lr: 1e-2, micro_batch_rows: 2, save_every: 2, evaluate_every: 2, log_every: 1}
deepspeed: ds_configs/cpu.json
output: run
sweep:
  sources.web.share: [0, 0.25]
  seeds: 2
  points:
    kl: {reference.sources.web: 0.5}
    bad: {train: {lr: 1e30, most_roll_backs: 0}}
"""
RUNS = [f"{point}/seed-{seed}" for seed in (0, 1) for point in ("web-0", "web-0.25", "kl", "bad")]
GOOD = [name for name in RUNS if not name.startswith("bad")]


@pytest.fixture(scope="module")
def data(tmp_path_factory, tiny_tokenizer):
    """A folder with a sweep that starts from a model in it."""
    folder = tmp_path_factory.mktemp("sweep")
    fingerprint = fingerprint_of(str(tiny_tokenizer))
    for name, kind, seed in (
        ("web", "text", 0),
        ("web-held", "text", 0),
        ("chat", "chat", 1),
        ("held", "chat", 1),
    ):
        shards = 1 if "held" in name else 2
        write_source(folder / name, kind, seed=seed, shards=shards, fingerprint=fingerprint)
    config = AutoConfig.for_model(
        "llama",
        vocab_size=400,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=4,
        max_position_embeddings=64,
        attention_dropout=0.1,
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(folder / "base")
    shutil.copytree(tiny_tokenizer, folder / "base", dirs_exist_ok=True)
    (folder / "recipe.yaml").write_text(RECIPE)
    return folder


@pytest.fixture
def here(data, monkeypatch):
    monkeypatch.chdir(data)
    return data


def changed(folder, **settings):
    """The recipe with another sweep."""
    path = folder / "changed.yaml"
    path.write_text(yaml.safe_dump(yaml.safe_load(RECIPE) | {"sweep": settings}))
    return str(path)


def names(path, *overrides):
    return [run.name for run in load(str(path), overrides).chosen]


def faults(path, *overrides):
    with pytest.raises(BadInput) as raised:
        load(str(path), overrides)
    return raised.value.faults


def test_every_combination_and_every_named_point_has_each_seed(here):
    path = changed(here, **{"sources.web.share": [0.1, 0.5], "train.lr": ["1e-4", 0.003]}, seeds=2)
    points = ["lr-1e-4_web-0.1", "lr-3e-3_web-0.1", "lr-1e-4_web-0.5", "lr-3e-3_web-0.5"]
    assert names(path) == [f"{point}/seed-{seed}" for seed in (0, 1) for point in points]
    runs = load(path).runs
    assert [run.number for run in runs] == list(range(1, 9))
    settings = {
        (r.recipe.sources["web"].share, r.recipe.train.lr, r.recipe.seed, r.recipe.output)
        for r in runs
    }
    assert (0.5, 1e-4, 1, "run/lr-1e-4_web-0.5/seed-1") in settings and len(settings) == 8
    assert all(run.recipe.sweep is None for run in runs)
    assert names("recipe.yaml") == RUNS
    assert names(changed(here, seeds=3), "seed=5") == [f"recipe/seed-{seed}" for seed in (5, 6, 7)]


@pytest.mark.parametrize(
    ("value", "name"),
    [
        (0, "0"),
        (0.05, "0.05"),
        ("1e-4", "1e-4"),
        (0.0001, "1e-4"),
        (3e-5, "3e-5"),
        (2.5e-5, "2.5e-5"),
        (0.25, "0.25"),
        (64, "64"),
        (2e6, "2000000"),
        ("200M", "200M"),
        (True, "true"),
        (None, "null"),
        ("data/web 2", "data-web-2"),
        ([[0, 0.5], [8, 0.25]], "0-0.5-8-0.25"),
    ],
)
def test_a_value_has_one_short_name_that_is_safe_in_files(value, name):
    assert value_name(value) == name


def test_a_share_is_the_same_fraction_however_it_is_written(here):
    def shares(value):
        (run,) = load(changed(here, **{"sources.web.share": [value]})).runs
        return {name: source.share for name, source in run.recipe.sources.items()}

    assert shares("2e-2") == shares(0.02)
    assert sum(shares("2e-2").values()) == pytest.approx(1) and shares("2e-2")["web"] == 0.02
    assert "web" not in shares("0e0")


def test_a_value_that_is_no_finite_number_is_named_as_a_text(here):
    assert value_name(float("inf")) == "Infinity" and value_name("nan") == "nan"


def test_settings_that_end_alike_are_told_apart(here):
    path = changed(here, **{"sources.web.max_epochs": [1], "sources.chat.max_epochs": [2, 3]})
    assert names(path)[0] == "chat-max_epochs-2_web-max_epochs-1/seed-0"


def test_runs_are_chosen_by_number_name_point_and_part(here):
    assert names("recipe.yaml", "sweep.only=2") == ["web-0.25/seed-0"]
    assert names("recipe.yaml", "sweep.only=[kl/seed-1, web-0]") == [RUNS[0], RUNS[4], RUNS[6]]
    parts = [names("recipe.yaml", f"sweep.part={place}/3") for place in (1, 2, 3)]
    assert parts[1] == RUNS[1::3] and sorted(name for part in parts for name in part) == sorted(
        RUNS
    )
    assert "which is no run or point" in faults("recipe.yaml", "sweep.only=web-0.5")[0]
    assert "must be I/N" in faults("recipe.yaml", "sweep.part=4/3")[0]


def test_one_run_is_a_recipe_and_a_whole_sweep_is_not(here):
    recipe = load_recipe("recipe.yaml", ["sweep.only=kl/seed-1"])
    assert (recipe.seed, recipe.output) == (1, "run/kl/seed-1")
    assert recipe.reference is not None and recipe.reference.sources == {"web": 0.5}
    with pytest.raises(BadInput, match=r"is a sweep with 8 runs, and this takes one of them"):
        load_recipe("recipe.yaml")


def test_all_faults_of_all_points_are_told_at_once_with_their_points_and_lines(here):
    path = changed(
        here, **{"train.lr": [1e-4, -1], "train.warmup": [0, 0.1], "sources.web.share": ["none"]}
    )
    told = faults(path)
    assert any(": train.lr is -1: it should be greater than 0" in fault for fault in told)
    assert any("changed.yaml:" in f and "sources.web.share is 'none'" in f for f in told)
    [fault] = [fault for fault in told if "train.lr" in fault]
    assert fault.startswith("point lr--1_warmup-0_web-none, lr--1_warmup-0.1_web-none: ")
    assert (
        "train.lrr is not a setting; did you mean lr?"
        in faults("recipe.yaml", "sweep.train.lrr=[1]")[0]
    )
    assert "must be a list of values" in faults("recipe.yaml", "sweep.sedes=3")[0]
    assert "seed is the sweep's to give" in faults("recipe.yaml", "sweep.seed=[1]")[0]
    assert (
        "2 points have the name" in faults("recipe.yaml", "sweep.sources.web.share=[0.1,1e-1]")[0]
    )


def test_a_source_without_a_share_is_evaluated_as_it_is_with_one(here):
    without, with_web = (run.recipe for run in load("recipe.yaml", ["sweep.only=[1,2]"]).chosen)
    assert list(without.sources) == ["chat"] and list(with_web.sources) == ["web", "chat"]
    one, other = (
        open_inputs(r, ranks=1, verify=False).held_out["web"] for r in (without, with_web)
    )
    assert one.packing == other.packing and one.packing.whole_below == 20
    assert one.rows_per_epoch == other.rows_per_epoch


def test_a_swept_share_is_the_fraction_of_the_rows_and_the_others_keep_their_ratio(here):
    settings = yaml.safe_load(RECIPE)
    settings["sources"] |= {"maths": settings["sources"]["chat"] | {"share": 0.25}}
    settings["sweep"] = {"sources.web.share": [0.05, 0.25]}
    (here / "shares.yaml").write_text(yaml.safe_dump(settings))
    for run, share in zip(load("shares.yaml").runs, (0.05, 0.25), strict=True):
        inputs = open_inputs(run.recipe, ranks=1, verify=False)
        rows = inputs.plan.shares_of_step(1).rows
        assert rows["web"] == pytest.approx(share, abs=1e-9)
        assert rows["chat"] == pytest.approx(3 * rows["maths"], rel=1e-9)


def test_a_swept_share_inside_a_group_is_that_of_the_group(here):
    settings = yaml.safe_load(RECIPE)
    settings["sources"]["maths"] = settings["sources"]["chat"] | {"share": 7}
    for name in ("web", "maths"):
        settings["sources"][name] |= {"group": "old"}
    settings["groups"] = {"old": {"share": 0.25}}
    settings["sweep"] = {"sources.web.share": [0.4]}
    (here / "shares.yaml").write_text(yaml.safe_dump(settings))
    (run,) = load("shares.yaml").runs
    rows = open_inputs(run.recipe, ranks=1, verify=False).plan.shares_of_step(1).rows
    assert rows["web"] == pytest.approx(0.25 * 0.4) and rows["chat"] == pytest.approx(0.75)


def test_what_follows_a_source_goes_with_it(here):
    settings = yaml.safe_load(RECIPE)
    settings["sources"]["web"]["group"] = "old"
    settings |= {"groups": {"old": {"share": 1}}, "reference": {"sources": {"web": 0.1}}}
    settings["sweep"] = {"sources.web.share": [0]}
    (here / "group.yaml").write_text(yaml.safe_dump(settings))
    recipe = load_recipe("group.yaml")
    assert recipe.groups == {} and recipe.reference is None


def test_the_table_says_what_each_run_will_train_before_it_does(here, capsys):
    assert main(["sweep", "recipe.yaml", "--json", "output=table"]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert [one["name"] for one in shown] == RUNS
    assert {one["state"] for one in shown} == {"waiting"}
    assert shown[0]["tokens"] == {"chat": 4 * 8 * 64}
    assert shown[1]["tokens"] == {"web": 8 * 64, "chat": 24 * 64}
    assert main(["plan", "recipe.yaml", "output=table", "--gpu", "cpu"]) == 0
    assert "web-0.25/seed-1" in capsys.readouterr().out
    assert main(["plan", "recipe.yaml", "sweep.only=1", "--gpu", "cpu"]) == 0
    assert main(["sweep", "recipe.yaml", "sweep=null"]) == 2
    assert "is no sweep" in capsys.readouterr().err
    assert main(["sweep", "recipe.yaml", "sources.web.path=nowhere"]) == 2
    told = capsys.readouterr().err
    assert "point web-0.25, kl, bad: sources.web.path: nowhere" in told


def test_the_listing_knows_failed_and_begun_runs(here):
    recipe = load_recipe("recipe.yaml", ["sweep.only=1", "output=listed"])
    folder = here / recipe.output

    def kind():
        return state_of(recipe, steps=4, evaluates=True).kind

    assert (kind(), fails_again(recipe)) == ("waiting", False)
    begin_attempt(folder)
    assert (kind(), fails_again(recipe)) == ("begun", True)  # its process may have died of it
    (folder / "checkpoints").mkdir()
    (folder / "checkpoints/latest").write_text("step-000002\n")
    assert (kind(), fails_again(recipe)) == ("begun", False)
    begin_attempt(folder, "no finite gradient")
    assert (kind(), fails_again(recipe)) == ("failed", True)


def test_runs_are_found_by_recipe_folder_of_all_and_folder_of_one(here):
    for name in ("web-0.25/seed-10", "web-0.25/seed-2", "kl/seed-0"):
        (here / "found" / name).mkdir(parents=True)
        (here / "found" / name / "recipe.yaml").write_text("")

    def found(place):
        return [str(each.folder.relative_to(here)) for each in find_result_folders([here / place])]

    runs = ["found/kl/seed-0", "found/web-0.25/seed-2", "found/web-0.25/seed-10"]
    assert found("found") == runs
    assert found("found/kl/seed-0") == ["found/kl/seed-0"]
    assert [run.recipe.output for run in load("recipe.yaml").chosen] == [f"run/{n}" for n in RUNS]
    with pytest.raises(BadInput, match=r"web has no recipe\.yaml"):
        read_runs([here / "web"])


@pytest.mark.slow
def test_an_engine_leaves_no_model_behind(tmp_path):
    assert run_on_ranks("models_left", 1, tmp_path) == [[[False, False]] * 3]


@pytest.fixture(scope="module")
def swept(data):
    """All runs of the sweep, one after another on two ranks."""
    return end(start(data, 2), timeout_s=600)


@pytest.mark.slow
def test_a_run_that_fails_is_told_and_the_others_are_done(swept, data):
    codes, said = swept
    assert codes == [1, 1], said
    assert "2 of 8 runs failed, the others are done" in said
    states = {
        run.name: state_of(run.recipe, steps=4, evaluates=True).kind
        for run in load(str(data / "recipe.yaml"), [f"output={data}/run"]).runs
    }
    assert states == {name: "done" if name in GOOD else "failed" for name in RUNS}


@pytest.mark.slow
@pytest.mark.parametrize("name", ["web-0/seed-1", "web-0.25/seed-1", "kl/seed-1"])
def test_a_run_of_a_sweep_is_bit_for_bit_the_run_alone(swept, data, name):
    recipe = load_recipe(str(data / "recipe.yaml"), [f"sweep.only={name}"])
    alone = data / f"alone-{name.replace('/', '-')}.yaml"
    alone.write_text(to_yaml(recipe.model_copy(update={"output": alone.stem})))
    codes, said = end(start(data, 2, recipe=alone.name))
    assert codes == [0, 0], said
    assert lines(data / alone.stem) == lines(data / "run" / name)
    assert weights(data / alone.stem) == weights(data / "run" / name)


@pytest.mark.slow
def test_all_runs_share_the_evaluation_before_the_first_step(swept, data):
    _, said = swept
    assert said.count("before the first step is that of run/web-0/seed-0") == len(RUNS) - 1
    first = [lines(data / "run" / name)[0] for name in GOOD]
    assert all(line == first[0] for line in first) and first[0]["held_out_loss/web"] > 0


@pytest.mark.slow
def test_a_sweep_that_is_killed_goes_on_to_the_same_end(swept, data):
    words = ("output=killed", "sweep.only=[web-0, web-0.25]")
    killed = start(data, 2, *words)
    wait_for(data / "killed/web-0/seed-0/export", killed)
    wait_for(data / "killed/web-0.25/seed-0/checkpoints/step-000002", killed)
    for process in killed:
        process.send_signal(signal.SIGKILL)
    end(killed)
    before = (data / "killed/web-0/seed-0/metrics.jsonl").stat().st_mtime_ns
    codes, said = end(start(data, 2, *words))
    assert codes == [0, 0], said
    assert "sweep: 1 of 4 runs are done" in said and "going on after step" in said
    assert (data / "killed/web-0/seed-0/metrics.jsonl").stat().st_mtime_ns == before
    for name in ("web-0/seed-0", "web-0.25/seed-0", "web-0/seed-1", "web-0.25/seed-1"):
        assert lines(data / "killed" / name) == lines(data / "run" / name)
        assert weights(data / "killed" / name) == weights(data / "run" / name)


@pytest.mark.slow
def test_a_run_that_another_command_trains_comes_last(swept, data):
    words = ("output=shared", "sweep.only=[web-0, web-0.25]", "sweep.seeds=1")
    held = data / "shared/web-0/seed-0"
    held.mkdir(parents=True)
    with (held / ".lock").open("w") as other_command:
        assert lock(other_command)
        started = start(data, 2, *words)
        wait_for(data / "shared/web-0.25/seed-0/export", started)
    codes, said = end(started)
    assert codes == [0, 0], said
    assert "sweep: run 1, web-0/seed-0, is trained by another command" in said
    for name in ("web-0/seed-0", "web-0.25/seed-0"):
        assert lines(data / "shared" / name) == lines(data / "run" / name)


@pytest.mark.slow
def test_a_sweep_that_is_asked_to_stop_ends_with_75_and_goes_on(swept, data):
    words = ("output=stopped", "sweep.only=[web-0, web-0.25]", "sweep.seeds=1")
    asked = start(data, 2, *words)
    wait_for(data / "stopped/web-0/seed-0/checkpoints/step-000002", asked)
    asked[0].send_signal(signal.SIGUSR1)
    codes, said = end(asked)
    assert codes == [75, 75], said
    codes, said = end(start(data, 2, *words))
    assert codes == [0, 0], said
    for name in ("web-0/seed-0", "web-0.25/seed-0"):
        assert lines(data / "stopped" / name) == lines(data / "run" / name)
