"""Recipes of several sources, and the inputs that they open."""

from dataclasses import replace

from support.corpora import write_source

from bigmix.data.loader import step_batch
from bigmix.data.records import RankRows
from bigmix.recipe import load_recipe, plain
from bigmix.runs.checkpoints import Position
from bigmix.train.inputs import open_inputs

RECIPE = """\
model: {config: {model_type: llama, vocab_size: 96, hidden_size: 32, intermediate_size: 64,
                 num_hidden_layers: 2,
                 num_attention_heads: 4, max_position_embeddings: 64}}
sequence_length: 64
rows_per_step: 8
sources:
  web: {path: web, role: replay, share: 0.25}
  code: {path: code, role: replay, share: 0.25}
  chat: {path: chat, role: task, share: 0.5}
budget: {steps: 20}
train: {lr: 1e-2, micro_batch_rows: 2, log_every: 1}
checkpoint: {export: false}
deepspeed: ds_configs/cpu.json
output: run
"""


def recipe_of_three(folder):
    """The folder, with the recipe in it, its three sources and one more."""
    write_source(folder / "web", "text", shards=3)
    write_source(folder / "code", "text", seed=1, documents=10)
    write_source(folder / "chat", "chat", seed=2)
    write_source(folder / "more", "text", seed=3, documents=16)
    (folder / "recipe.yaml").write_text(RECIPE)
    return folder


AT = 7  # steps before the change


def opened(*overrides):
    recipe = load_recipe("recipe.yaml", overrides)
    return recipe, open_inputs(recipe, ranks=1, verify=False)


def position(recipe, inputs, step=AT):
    tokens = dict.fromkeys(recipe.sources, 0)
    rank_rows = RankRows(rank=0, ranks=1, rows_per_step=recipe.rows_per_step, micro_batch_rows=2)
    for k in range(inputs.plan.segment.after + 1, step + 1):
        for name, count in step_batch(inputs.plan, rank_rows, k).tokens.items():
            tokens[name] += count
    for name, count in inputs.plan.segment.tokens.items():
        tokens[name] = tokens.get(name, 0) + count
    return Position(
        step=step,
        report={"totals": {"tokens": tokens}},
        recipe=plain(recipe),
        data=inputs.plan.position(step),
        content=inputs.content,
    )


GOOD = """\
model: {path: base}
sequence_length: 2048
rows_per_step: 64
sources:
  web:   {path: data/web, role: replay, share: 0.2}
  gsm8k: {path: data/gsm8k, role: task, share: 0.8, held_out: data/gsm8k-test}
budget: {task_tokens: 2e6}
train: {lr: 2e-5, schedule: cosine, warmup: 0.03}
evaluate: {every: 100}
checkpoint: {every: 500}
output: runs/two-way
"""


def resumed(inputs, recipe, position, *, new_segment):
    """The inputs with the plan from a position on."""
    return replace(inputs, plan=inputs.resumed_plan(recipe, position, new_segment=new_segment))


def decided(inputs, recipe, position):
    """The inputs with the plan after a decision."""
    return replace(inputs, plan=inputs.decided_plan(recipe, inputs.plan, position))


def with_quarantine(inputs, quarantine):
    """The inputs with rows of these shards replaced."""
    return replace(inputs, plan=inputs.plan.with_quarantine(quarantine))
