"""A recipe is read whole or refused with every fault, each with its line and key."""

import pytest
import yaml
from support.recipes import GOOD

from bigmix.commands.main import main
from bigmix.errors import BadInput
from bigmix.recipe import differences, load_recipe, to_yaml


def write(tmp_path, text):
    path = tmp_path / "recipe.yaml"
    path.write_text(text)
    return str(path)


def faults(tmp_path, text, *overrides):
    with pytest.raises(BadInput) as caught:
        load_recipe(write(tmp_path, text), overrides)
    return caught.value.faults


def test_a_real_job_takes_fewer_than_fifteen_lines(tmp_path):
    recipe = load_recipe(write(tmp_path, GOOD))
    assert len(GOOD.splitlines()) <= 15
    assert recipe.budget.task_tokens == 2_000_000 and recipe.train.lr == 2e-5
    assert recipe.task_names == ("gsm8k",)
    assert recipe.held_out_paths == {"gsm8k": "data/gsm8k-test"}


def test_overrides_reach_any_setting(tmp_path):
    recipe = load_recipe(
        write(tmp_path, GOOD),
        ["train.steps=100", "sources.web.share=0.3", "sequence_length=4K", "held_out.x=data/x"],
    )
    assert recipe.train.steps == 100 and recipe.sources["web"].share == 0.3
    assert recipe.sequence_length == 4000 and recipe.held_out == {"x": "data/x"}


def test_the_resolved_recipe_reads_back_equal(tmp_path):
    recipe = load_recipe(write(tmp_path, GOOD), ["sources.web.share=[[0, 0.5], [100, 0.1]]"])
    again = load_recipe(write(tmp_path, to_yaml(recipe)))
    assert again == recipe and list(differences(again, recipe)) == []
    assert set(yaml.safe_load(to_yaml(recipe))) == set(type(recipe).model_fields)


def test_all_faults_come_at_once_with_their_lines(tmp_path):
    text = GOOD.replace("share: 0.2", "share: 0").replace("cosine", "cosin") + "sede: 3\n"
    found = faults(tmp_path, text, "rows_per_step=-1")
    assert len(found) == 4
    lines = "\n".join(found)
    assert "recipe.yaml:5: sources.web.share is 0, must be above 0; to leave web out" in lines
    assert "recipe.yaml:8: train.schedule is 'cosin'" in lines
    assert "recipe.yaml:12: sede is not a setting; did you mean seed?" in lines
    assert "override rows_per_step=-1: rows_per_step is -1" in lines


@pytest.mark.parametrize(
    "key",
    [
        "sources.web.share",
        "sources.web.max_epochs",
        "train.lr",
        "train.ema",
        "budget.steps",
        "rows_per_step",
        "seed",
    ],
)
def test_a_truth_value_is_no_number(tmp_path, key):
    (fault,) = faults(tmp_path, GOOD, "budget={steps: 8}", f"{key}=true")
    assert f"{key} is True: it should be a number" in fault


def test_a_truth_value_among_numbers_is_told(tmp_path):
    points, betas = "sources.web.share=[[0, 0.5], [9, yes]]", "train.betas=[0.9, true]"
    one, two = faults(tmp_path, GOOD, points, betas)
    assert "sources.web.share.1.1 is True: it should be a number" in one
    assert "train.betas.1 is True: it should be a number" in two


def test_a_path_in_the_home_folder_is_there(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    recipe = load_recipe(write(tmp_path, GOOD), ["output=~/run", "sources.web.path=~/web"])
    assert recipe.output == f"{tmp_path}/home/run"
    assert recipe.sources["web"].path == f"{tmp_path}/home/web"
    for key in ("output", "model.path", "sources.web.path"):
        assert any(key in fault for fault in faults(tmp_path, GOOD, f"{key}=''"))


def test_settings_that_would_do_nothing_or_overflow_are_refused(tmp_path):
    (fault,) = faults(tmp_path, GOOD, "health.spikes_roll_back=true")
    assert "set spike_deviations=6" in fault
    (fault,) = faults(tmp_path, GOOD, f"seed={2**63}")
    assert "seed" in fault


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("share: 0.2", "share: -0.2", "sources.web.share is -0.2, must be above 0"),
        ("share: 0.2", "share: [[5, 0.1]]", "begins at step 5; the first point must be at step 0"),
        ("share: 0.2", "share: [[0, 1], [0, 2]]", "they must grow"),
        ("share: 0.2", "share: [[0, 0]]", "0 at every point"),
        ("share: 0.2", "shaer: 0.2", "sources.web.shaer is not a setting; did you mean share?"),
        ("role: task", "role: taks", "sources.gsm8k.role is 'taks'"),
        ("path: base", "", "neither of path and config"),
        ("path: base", "config: {hidden_size: 3}", "config has no model_type"),
        ("task_tokens: 2e6", "task_tokens: 2e6, steps: 3", "budget has task_tokens and steps"),
        ("budget: {task_tokens: 2e6}", "", "budget is empty"),
        ("role: task", "role: replay", "no source has role: task"),
        ("lr: 2e-5", "lr: .inf", "train.lr"),
        ("output: runs/two-way", "", "output is missing"),
        ("rows_per_step: 64", "rows_per_step: 64\nseed: 1\nseed: 2", "seed is here a second time"),
        ("model: {path: base}", "model: {path: [}", "is not YAML"),
        (GOOD, "[]", "holds no settings"),
        (
            "output:",
            "reference: {sources: {wbe: 0.1}}\noutput:",
            "reference.sources.wbe is no source; known are: web, gsm8k",
        ),
        ("output:", "reference: {sources: {web: -1}}\noutput:", "reference.sources.web is -1"),
        (
            "path: base}",
            "config: {model_type: llama}}\nreference: {sources: {web: 0.1}}",
            "reference.model is not given, and a model from scratch has no model.path",
        ),
        ("output:", "loss: {label_smoothing: 1}\noutput:", "loss.label_smoothing is 1"),
        ("output:", "loss: {backend: cuda}\noutput:", "loss.backend is 'cuda'"),
        ("output:", "held_out: {gsm8k: x}\noutput:", "and sources.gsm8k.held_out are both given"),
        ("gsm8k:", "behaviour:", "sources.behaviour has the name of the base's answers"),
        ("output:", "held_out: {behaviour: x}\noutput:", "held_out.behaviour has the name of"),
        (
            "output:",
            "tasks: {behaviour: {path: x, scores: [bleu]}}\noutput:",
            "tasks.behaviour has the name of the base's answers",
        ),
        ("output:", "behaviour: sometimes\noutput:", "behaviour.when is 'sometimes'"),
        ("output:", "behaviour: {languages: [fr]}\noutput:", "behaviour.languages"),
        (
            "path: base}",
            "config: {model_type: llama}}\nbehaviour: ends",
            "behaviour.when is ends, and a model from scratch has no behaviour to keep",
        ),
    ],
)
def test_each_fault_is_named(tmp_path, old, new, said):
    assert old in GOOD
    assert any(said in fault for fault in faults(tmp_path, GOOD.replace(old, new)))


def test_a_controller_looks_at_behaviour_only_where_each_evaluation_measures_it(tmp_path):
    watch = "sources.web.share={controller: forgetting, limit: 1, held_out: [behaviour]}"
    said = "sources.web.share.held_out names behaviour, which is not measured where shares are"
    scratch = "model={config: {model_type: llama}}"
    for words in (["behaviour=ends"], ["behaviour=off"], [scratch]):
        (found,) = faults(tmp_path, GOOD, watch, *words)
        assert said in found
    for when in ("auto", "every"):
        recipe = load_recipe(write(tmp_path, GOOD), [watch, f"behaviour={when}"])
        (controller,) = recipe.controllers.values()
        assert recipe.watched_sets(controller) == ("behaviour",)


def test_documents_cannot_weigh_alike_where_every_token_does(tmp_path):
    (found,) = faults(tmp_path, GOOD, "objective=per_token", "sources.gsm8k.weigh=document")
    assert "sources.gsm8k.weigh is document, and objective per_token counts every" in found


def test_a_missing_file_and_a_crooked_override_are_refused(tmp_path):
    with pytest.raises(BadInput, match="nowhere.yaml cannot be read"):
        load_recipe(str(tmp_path / "nowhere.yaml"))
    assert "is not KEY=VALUE" in faults(tmp_path, GOOD, "train.lr")[0]
    assert "has no keys" in faults(tmp_path, GOOD + "seed: 1\n", "seed.x=3")[0]


GROUPED = GOOD.replace(
    "  web:   {path: data/web, role: replay, share: 0.2}\n",
    "  web: {path: w, role: replay, share: {temperature: 0.5}, group: old}\n"
    "  code: {path: c, role: replay, share: {temperature: 0.5}, group: old, max_epochs: 4}\n",
).replace("budget:", "groups: {old: {share: [[0, 0.2], [100, 0.1]]}}\nbudget:")


def test_groups_temperatures_and_lengths_are_read(tmp_path):
    recipe = load_recipe(
        write(tmp_path, GROUPED), ["sequence_length=[[0, 512], [100, 2K]]", "pad_to_multiple=128"]
    )
    assert recipe.sources["web"].share.temperature == 0.5 and recipe.sources["web"].group == "old"
    assert recipe.groups["old"].share == ((0, 0.2), (100, 0.1))
    assert recipe.lengths == ((0, 512), (100, 2000)) and recipe.longest_row == 2048
    assert load_recipe(write(tmp_path, to_yaml(recipe))) == recipe


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        (
            "group: old}",
            "group: odl}",
            "sources.web.group is odl, which is no group; known are: old",
        ),
        (
            "{old: {share",
            "{gsm8k: {share: 1}, old: {share",
            "groups.gsm8k has the name of a source",
        ),
        ("{old: {share", "{x: {share: 1}, old: {share", "groups.x has no source in it"),
        ("{old: {", "{old: {group: old, ", "groups.old is inside itself"),
        (
            "temperature: 0.5}, group: old, max",
            "temperature: 0.7}, group: old, max",
            "must have the same one",
        ),
        ("{temperature: 0.5}, group: old, max", "0.5, group: old, max", "must have the same one"),
        (
            "{temperature: 0.5}, group: old, max",
            "{temprature: 0.5}, group: old, max",
            "did you mean temperature?",
        ),
        (
            "{temperature: 0.5}, group: old, max",
            "{temperature: -1}, group: old, max",
            "sources.code.share.temperature is -1",
        ),
        ("share: [[0, 0.2]", "share: [[0, -0.2]", "groups.old.share.0.1 is -0.2"),
        (
            "{share: [[0, 0.2], [100, 0.1]]}",
            "{share: {temperature: 1}}",
            "must be a number or points",
        ),
        ("sequence_length: 2048", "sequence_length: [[3, 2048]]", "the first must be 0"),
        ("max_epochs: 4", "max_epochs: 0", "sources.code.max_epochs is 0"),
    ],
)
def test_each_fault_of_groups_and_lengths_is_named(tmp_path, old, new, said):
    assert old in GROUPED
    assert any(said in fault for fault in faults(tmp_path, GROUPED.replace(old, new, 1)))


def test_single_settings_are_shown_for_scripts(tmp_path, capsys):
    path = write(tmp_path, GOOD)
    words = ["recipe", "show", path, "output=runs/a b", "--key", "output", "--key", "train.lr"]
    assert main([*words, "--key", "sources.web.share"]) == 0
    assert capsys.readouterr().out.splitlines() == ["runs/a b", "2e-05", "0.2"]
    assert main(["recipe", "show", path, "--key", "outputs"]) == 2
    assert "--key is outputs, which is no setting of this recipe" in capsys.readouterr().err
