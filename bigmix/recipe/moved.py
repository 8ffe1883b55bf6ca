"""Settings that earlier releases had in another table."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class MovedSetting:
    """Where a setting is now; `values` are what its old values are called there."""

    key: str
    example: str
    values: Mapping[Any, Any] | None = None


_SAVE = {"background": True, "blocking": False}
_TABLES = {
    "evaluate": {
        "evaluate_every": "every",
        "evaluate_rows": "rows",
        "evaluate_kl": "kl",
        "task_weights": "task_weights",
    },
    "checkpoint": {
        "save_every": "every",
        "keep_checkpoints": "keep",
        "keep_every": "keep_every",
        "resume": "resume",
        "max_minutes": "max_minutes",
        "stop_before_end_minutes": "stop_before_end_minutes",
        "export": "export",
        "export_shard_gib": "export_shard_gib",
    },
    "health": {
        "hang_minutes": "hang_minutes",
        "dead_after_s": "dead_after_s",
        "roll_back_after": "roll_back_after",
        "most_roll_backs": "most_roll_backs",
        "spike_deviations": "spike_deviations",
        "spikes_roll_back": "spikes_roll_back",
    },
}
MOVED: Mapping[str, MovedSetting] = {
    f"train.{old}": MovedSetting(f"{table}.{new}", f"{table}: {{{new}: ...}}")
    for table, names in _TABLES.items()
    for old, new in names.items()
} | {
    "train.save": MovedSetting(
        "checkpoint.background", "checkpoint: {background: true} or false", _SAVE
    )
}


def with_moved_keys(tree: Mapping[str, Any]) -> dict[str, Any]:
    """A recipe that an earlier release has written, with its settings in the tables of today."""
    moved = dict(tree)
    train = dict(moved["train"]) if isinstance(moved.get("train"), Mapping) else {}
    for old, setting in MOVED.items():
        name = old.removeprefix("train.")
        if name not in train:
            continue
        value = train.pop(name)
        table, key = setting.key.split(".")
        value = setting.values.get(value, value) if setting.values is not None else value
        moved[table] = {**moved.get(table, {}), key: value}
    return moved | ({"train": train} if "train" in moved else {})
