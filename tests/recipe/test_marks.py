"""The marks on the settings of a recipe say what may change at a resume, and what a moved setting
is called now.
"""

import pytest
import yaml
from support.recipes import GOOD

from bigmix.errors import BadInput
from bigmix.recipe import from_plain, load_recipe, plain
from bigmix.recipe.fields import AtResume
from bigmix.recipe.marks import at_resume, matters_before_first_step, moves_rows
from bigmix.recipe.moved import MOVED, with_moved_keys
from bigmix.recipe.tree import leaves

FREE = {
    "output", "bad_shards", "deepspeed", "pad_to_multiple", "model.activation_checkpointing",
    "loss.entropy", "loss.backend", "loss.head_gradient", "loss.chunk_mib",
    "train.micro_batch_rows", "train.log_every", "train.prefetch_steps", "evaluate.kl",
    "evaluate.task_weights", "health.hang_minutes", "health.dead_after_s",
    "health.most_roll_backs", "sources.a.b.path",
}  # fmt: skip
FREE_TABLES = ("cache.", "tasks.", "checkpoint.")
LEARNED = {
    "objective", "loss.z_loss", "train.lr", "train.betas", "train.ema", "train.pass_over",
    "train.steps", "budget.steps", "health.roll_back_after", "health.spike_deviations",
    "health.spikes_roll_back", "reference.sources.a.b", "held_out.x", "rows_per_step",
    "sources.a.b.share", "sources.a.b.weigh", "groups.g.share",
}  # fmt: skip
MOVING = {
    "sequence_length", "rows_per_step", "evaluate.every", "sources.a.b.share",
    "sources.a.b.share.controller", "sources.a.b.max_epochs", "sources.a.b.whole_below",
    "sources.a.b.group", "groups.g.share", "groups.g.group",
}  # fmt: skip
STAYING = {
    "sources.a.b.path", "sources.a.b.role", "sources.a.b.weigh", "sources.a.b.held_out",
    "sources.a.b.loss_share", "groups.g.loss_share", "train.lr", "objective", "seed",
    "evaluate.rows", "checkpoint.every",
}  # fmt: skip
BEFORE = {
    "model.path", "model.dtype", "seed", "pad_to_multiple", "tasks.t.samples", "deepspeed",
    "loss.label_smoothing", "train.micro_batch_rows", "evaluate.rows", "evaluate.kl",
    "evaluate.task_weights",
}  # fmt: skip


def all_settings():
    sources = {"a.b": {"path": "p", "role": "task", "share": 1}}
    tree = yaml.safe_load(GOOD) | {"sources": sources}
    return set(leaves(plain(from_plain(tree, "here"))))


def test_what_is_free_at_a_resume_changes_nothing_that_is_learned():
    free = {key for key in all_settings() if at_resume(key) is AtResume.FREE}
    assert free >= FREE
    assert all(key in FREE or key.startswith(FREE_TABLES) for key in free)
    assert all(at_resume(key) is None for key in LEARNED)
    for key in ("evaluate.every", "evaluate.rows"):
        assert at_resume(key) is AtResume.FREE_WITHOUT_CONTROLLERS


def test_the_model_and_the_seed_are_fixed_but_for_what_only_costs_memory():
    for key in ("model.path", "model.config.hidden_size", "model.dtype", "seed"):
        assert at_resume(key) is AtResume.FIXED
    assert at_resume("model.activation_checkpointing") is AtResume.FREE


def test_settings_of_sources_move_rows_but_for_those_that_say_otherwise():
    assert all(moves_rows(key) for key in MOVING)
    assert not any(moves_rows(key) for key in STAYING)


def test_what_matters_before_the_first_step_is_the_model_and_how_it_is_evaluated():
    assert all(matters_before_first_step(key) for key in BEFORE)
    later = ("sources.a.b.share", "held_out.x", "train.lr", "train.ema", "evaluate.every", "output",
             "checkpoint.every", "health.dead_after_s", "cache.size", "sweep.seeds")  # fmt: skip
    assert not any(matters_before_first_step(key) for key in later)


@pytest.mark.parametrize("old", MOVED)
def test_a_setting_at_its_old_place_is_refused_with_its_new_one(tmp_path, old):
    name, value = old.removeprefix("train."), "blocking" if old == "train.save" else 7
    (tmp_path / "recipe.yaml").write_text(GOOD.replace("lr: 2e-5", f"lr: 2e-5, {name}: {value}"))
    with pytest.raises(BadInput) as refused:
        load_recipe(str(tmp_path / "recipe.yaml"))
    table, new = MOVED[old].key.split(".")
    assert f"recipe.yaml:8: {old} is {table}.{new} now; write {table}: {{{new}: " in str(
        refused.value
    )


def test_a_recipe_that_an_earlier_release_has_written_is_read_as_it_was_meant():
    tree = yaml.safe_load(GOOD)
    new = plain(from_plain(tree, "here"))
    old = {key: value for key, value in new.items() if key not in ("checkpoint", "health")}
    old["train"] = dict(new["train"])
    for key, setting in MOVED.items():
        table, name = setting.key.split(".")
        value = new[table][name]
        old["train"][key.removeprefix("train.")] = (
            "background" if key == "train.save" and value else value
        )
    del old["evaluate"]
    assert plain(from_plain(old, "here")) == new
    assert with_moved_keys(new) == new
