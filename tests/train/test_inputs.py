"""What a recipe names is opened and checked before anything starts; each fault is told once, and
clearly.
"""

import json
import re
import shutil
from dataclasses import replace

import pytest
from support.corpora import write_source

from bigmix.commands.main import main
from bigmix.errors import BadInput
from bigmix.evaluation.inputs import open_held_out
from bigmix.recipe import load_recipe
from bigmix.train.inputs import baseline_cache_key, open_inputs


@pytest.fixture
def world(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_source(tmp_path / "web", "text")
    write_source(tmp_path / "chat", "chat", seed=1)
    write_source(tmp_path / "held", "chat", seed=1, shards=1)
    (tmp_path / "recipe.yaml").write_text("""\
model: {config: {model_type: llama}}
sequence_length: 64
rows_per_step: 8
sources:
  web: {path: web, role: replay, share: 0.25}
  chat: {path: chat, role: task, share: 0.75, held_out: held}
budget: {steps: 10}
train: {lr: 1e-2}
deepspeed: ds_configs/cpu.json
output: run
""")
    return tmp_path


def opened(*overrides, ranks=2, verify=True):
    return open_inputs(load_recipe("recipe.yaml", overrides), ranks=ranks, verify=verify)


def faults(*overrides, ranks=2):
    with pytest.raises(BadInput) as caught:
        opened(*overrides, ranks=ranks)
    return caught.value.faults


def test_sound_inputs_open(world):
    inputs = opened()
    assert set(inputs.plan.streams) == {"web", "chat"} and set(inputs.held_out) == {"chat"}
    assert inputs.plan.steps == 10


def test_rows_must_divide_over_ranks_and_micro_batches(world):
    (fault,) = faults("train.micro_batch_rows=3")
    assert "rows_per_step is 8, must be a multiple of ranks x train.micro_batch_rows" in fault
    assert "2 x 3 = 6; set rows_per_step=6" in fault


def test_every_fault_is_told_at_once(world):
    found = faults("train.micro_batch_rows=3", "sources.web.path=nowhere", "deepspeed=no.json")
    assert len(found) == 3
    assert any("sources.web.path: nowhere is not a prepared source" in fault for fault in found)
    assert any("no.json does not exist" in fault and "zero3.json" in fault for fault in found)


def test_a_corrupt_manifest_is_refused(world):
    (world / "web" / "manifest.json").write_text('{"version": 1, "kind"')
    assert "is not a whole manifest" in faults()[0]
    (world / "web" / "manifest.json").write_text('{"version": 9}')
    assert "has version 9, this bigmix reads 2" in faults()[0]


@pytest.mark.parametrize(
    ("harm", "said"),
    [
        (lambda p: p.unlink(), "the file is missing"),
        (lambda p: p.write_bytes(p.read_bytes()[:-700]), "bytes, the manifest says"),
        (lambda p: p.write_bytes(b"x" * p.stat().st_size), "sha256"),
        (lambda p: p.write_bytes(p.read_bytes()[:1400] + b"~" + p.read_bytes()[1401:]), "sha256"),
    ],
)
def test_a_corrupt_shard_is_named(world, harm, said):
    harm(world / "web" / "shard-00001.tar")
    (fault,) = faults()
    assert "sources.web.path: web/shard-00001.tar" in fault and said in fault


def test_another_tokenizer_is_refused(world):
    write_source(world / "other", "text", fingerprint="e" * 64)
    (fault,) = faults("sources.web.path=other")
    assert "prepared with another tokenizer" in fault


def test_an_empty_source_is_refused(world):
    manifest = json.loads((world / "web" / "manifest.json").read_text())
    manifest |= {"shards": [], "documents": 0, "tokens": 0, "loss_tokens": 0}
    (world / "web" / "manifest.json").write_text(json.dumps(manifest))
    assert "web holds no document" in faults()[0]


def test_a_source_whose_documents_are_all_too_long_is_refused(world):
    write_source(world / "long", "chat", lengths=(65, 80))
    (fault,) = faults("sources.chat.path=long")
    assert "none of its 80 documents fits a row" in fault and "truncate" in fault


def test_a_schedule_that_leaves_nothing_is_refused(world):
    text = "[[0, 1], [5, 0]]"
    found = faults(f"sources.web.share={text}", f"sources.chat.share={text}")
    assert "share of every source is 0 at step 5" in found[0]


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ({"train_batch_size": 99}, "train_batch_size is 99 in the file and 8 by the recipe"),
        ({"gradient_clipping": 5}, "gradient_clipping is 5"),
        ({"optimizer": {"type": "Adam"}}, "optimizer is set in the file; the recipe decides"),
        ({"fp16": {"enabled": True}}, "fp16 is set"),
    ],
)
def test_a_deepspeed_file_that_contradicts_the_recipe_is_refused(world, keys, said):
    (world / "ds.json").write_text(json.dumps(keys))
    assert any(said in fault for fault in faults("deepspeed=ds.json"))


def test_no_average_is_kept_of_weights_on_nvme(world):
    (fault,) = faults("train.ema=0.99", "deepspeed=ds_configs/zero3_nvme.json")
    assert "train.ema is 0.99 and ds_configs/zero3_nvme.json keeps the optimizer on NVMe" in fault


def test_a_budget_of_task_tokens_leaves_replay_on_top(world):
    def steps(share):
        recipe = load_recipe(
            "recipe.yaml",
            ["budget.steps=null", "budget.task_tokens=100K", f"sources.web.share={share}"],
        )
        return open_inputs(recipe, ranks=2, verify=False).plan.steps

    one_way, two_way = steps(1e-9), steps(0.75)
    assert two_way == pytest.approx(2 * one_way, abs=1)


def test_a_budget_on_a_schedule_is_added_up_step_by_step(world):
    recipe = load_recipe(
        "recipe.yaml",
        [
            "budget.steps=null",
            "budget.total_tokens=100K",
            "sources.web.share=[[0, 1], [50, 0.1]]",
        ],
    )
    inputs = open_inputs(recipe, ranks=2, verify=False)
    rows = inputs.plan.mixture.counts(inputs.plan.steps * 8)
    means = {n: s.tokens_per_epoch / s.rows_per_epoch for n, s in inputs.plan.streams.items()}
    tokens = sum(rows[n] * means[n] for n in rows)
    assert tokens == pytest.approx(100_000, rel=0.01)


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ({"zero_optimization": {"stage": 0}}, "zero_optimization.stage is 0"),
        ({"zero_optimization": {"stage": 4}}, "must be 1, 2 or 3"),
        ({}, "zero_optimization.stage is 0"),
        ({"zero_optimization": None}, "zero_optimization is null"),
        ({"bf16": "auto", "zero_optimization": {"stage": 1}}, 'bf16 is "auto"'),
        ({"elasticity": {"enabled": True}, "zero_optimization": {"stage": 1}}, "elasticity is set"),
    ],
)
def test_a_deepspeed_file_that_cannot_be_used_is_named(world, keys, said):
    (world / "ds.json").write_text(json.dumps(keys))
    with pytest.raises(BadInput, match=re.escape(said)):
        opened("deepspeed=ds.json")


def test_a_deepspeed_file_that_is_no_text_is_named(world):
    (world / "ds.json").write_bytes(b'{"comment": "caf\xe9"}')
    with pytest.raises(BadInput, match="is not JSON"):
        opened("deepspeed=ds.json")


def test_a_warm_up_that_never_ends_is_told(world):
    assert any("while the learning rate still rises" in n for n in opened("train.warmup=10").notes)
    assert not any("learning rate" in note for note in opened("train.warmup=9").notes)


def test_rows_of_a_step_that_the_run_has_not_are_refused(world, capsys):
    assert main(["rows", "recipe.yaml", "--step", "10"]) == 0
    assert main(["rows", "recipe.yaml", "--step", "11"]) == 2
    assert "the run has 10 steps" in capsys.readouterr().err


def test_tasks_are_asked_alike_in_a_run_and_in_an_evaluation(world):
    """As chats where any source or held-out set of the recipe is one, trained on or not."""
    (world / "task.jsonl").write_text('{"prompt": "a", "response": "b"}\n')
    task = "tasks={t: {path: task.jsonl, scores: [exact_match]}}"
    text_alone = ["sources.chat.held_out=null", "held_out={more: web}"]
    template = opened("budget.steps=4").sources["chat"].manifest.template
    assert template is not None
    for overrides in ([], text_alone):
        recipe = load_recipe("recipe.yaml", [task, *overrides])
        inputs, alone = opened(task, *overrides), open_held_out(recipe, verify=True)
        for manifests in (inputs.manifests, [*alone.manifests, *alone.trained]):
            assert {m.template.sha256 for m in manifests if m.template} == {template.sha256}
    # A sweep's point without the source has it held out still.
    without = ["sources={web: {path: web, role: task, share: 1}}", "held_out={chat: held}"]
    assert any(m.template for m in opened(task, *without).manifests)
    # And where none of it can be read, that decides nothing.
    shutil.rmtree(world / "chat")
    with pytest.raises(BadInput, match="or set their format to chat or text"):
        open_held_out(load_recipe("recipe.yaml", [task, *text_alone]), verify=True)
    open_held_out(load_recipe("recipe.yaml", text_alone), verify=True)


def test_what_is_found_before_the_first_step_follows_from_the_template_of_tasks(world):
    one, other = opened(), opened("sources.chat.held_out=null", "held_out={chat: held}")
    recipe = load_recipe("recipe.yaml")
    assert baseline_cache_key(recipe, one, 2) == baseline_cache_key(recipe, other, 2)
    text = opened("sources={web: {path: web, role: task, share: 1, held_out: web}}")
    with_chat, without = (replace(inputs, held_out={}) for inputs in (one, text))
    assert baseline_cache_key(recipe, with_chat, 2) != baseline_cache_key(recipe, without, 2)


def trained_on(folder, kinds, *, chat_model):
    """The notes about replay of a run with these kinds of sources, by role."""
    (folder / "base model").mkdir(exist_ok=True)
    template = {"chat_template": "{{ messages }}"} if chat_model else {}
    (folder / "base model" / "tokenizer_config.json").write_text(json.dumps(template))
    sources = [
        f"sources.{role}={{path: {'web' if kind == 'text' else 'chat'}, role: {role}, share: 0.5}}"
        for role, kind in kinds.items()
    ]
    overrides = ["model={path: 'base model'}", "sources={}", *sources]
    return [note for note in opened(*overrides).notes if "replayed" in note]


@pytest.mark.parametrize("task", ["text", "chat"])
@pytest.mark.parametrize("replay", [None, "text", "chat"])
def test_a_chat_model_without_chat_replay_is_noted_with_what_to_type(world, task, replay):
    kinds = {"task": task} | ({"replay": replay} if replay else {})
    notes = trained_on(world, kinds, chat_model=True)
    if replay == "chat":
        assert notes == []
        return
    (note,) = notes
    command = "`bigmix self-replay 'base model' --kind chat --tokens 2M --output data/replay-chat`"
    assert note.startswith("base model is a chat model") and command in note
    line = re.search(r"`(replay-chat: .*)`", note)[1]
    again = load_recipe("recipe.yaml", [f"sources.{line.replace(': ', '=', 1)}"])
    assert again.sources["replay-chat"].role == "replay"


@pytest.mark.parametrize("task", ["text", "chat"])
@pytest.mark.parametrize("replay", [None, "text", "chat"])
def test_a_base_model_that_gets_chats_alone_is_noted_with_what_to_type(world, task, replay):
    kinds = {"task": task} | ({"replay": replay} if replay else {})
    notes = trained_on(world, kinds, chat_model=False)
    assert len(notes) == ("text" not in kinds.values())
    for note in notes:
        assert "is trained on chats alone" in note
        assert "--kind text --tokens 2M --output data/replay-text`" in note


def test_a_model_from_scratch_has_nothing_to_forget(world):
    assert not [note for note in opened().notes if "replayed" in note]
