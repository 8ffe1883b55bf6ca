"""A recipe and its inputs go in; out comes what the evaluation before the first step follows from, to find equal ones."""

import json
from dataclasses import dataclass
from pathlib import Path

from bigmix.evaluation.evaluator import Findings
from bigmix.evaluation.held_out import Base
from bigmix.recipe import Recipe, plain
from bigmix.train.inputs import Inputs

# What is of no effect before the first step. A setting that is not named here counts, so that a new one is on the safe side.
_LATER = frozenset(
    {
        "sources", "groups", "held_out", "budget", "objective", "rows_per_step", "reference", "bad_shards", "cache", "output", "sweep",
        "sequence_length",
    }
)  # fmt: skip
_LATER_IN_TRAIN = frozenset(
    {
        "lr", "schedule", "warmup", "decay", "final_lr", "weight_decay", "betas", "eps", "clip", "steps", "max_minutes",
        "stop_before_end_minutes", "hang_minutes", "dead_after_s", "evaluate_every", "save_every", "save", "keep_checkpoints",
        "keep_every", "log_every", "prefetch_steps", "pass_over", "roll_back_after", "most_roll_backs", "spike_deviations",
        "spikes_roll_back", "resume", "export", "export_shard_gib", "ema",
    }
)  # fmt: skip


@dataclass(frozen=True, kw_only=True, slots=True)
class FirstEvaluation:
    """What a run has found before its first step, what its forgetting is measured from, and its folder."""

    found: Findings
    base: Base
    folder: Path


def what_it_follows_from(recipe: Recipe, inputs: Inputs, ranks: int) -> str:
    """Two runs with the same text here find the same numbers before their first step, to the last bit."""
    settings = {key: value for key, value in plain(recipe).items() if key not in _LATER}
    settings["train"] = {k: v for k, v in settings["train"].items() if k not in _LATER_IN_TRAIN}
    # It draws the weights of a model from scratch, and answers to tasks that are drawn.
    if recipe.model.path is not None and not any(t.temperature for t in recipe.tasks.values()):
        del settings["seed"]
    data = {
        name: [str(stream.packer), *(shard.sha256 for shard in stream.manifest.shards)]
        for name, stream in inputs.held_out.items()
    }
    # Tasks are asked as the chats of the sources are written.
    templates = {m.template.sha256 for m in inputs.manifests if m.template is not None}
    return json.dumps([settings, data, sorted(templates), ranks], sort_keys=True)
