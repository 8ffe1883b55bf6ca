"""Reads a summary.json of `bigmix compare` over one task of docs/study."""

import json
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

Spread = Mapping[str, Any]


@dataclass(frozen=True, kw_only=True, slots=True)
class Study:
    """A summary, with the replay source and the task source that the study is about."""

    summary: Mapping[str, Any]
    replay: str
    task: str

    @property
    def points(self) -> Mapping[str, Any]:
        found: Mapping[str, Any] = self.summary["points"]
        return found

    def line(self, index: int = 0) -> dict[float, Mapping[str, Any]]:
        """The points of a line over replay's share, by share."""
        named = [self.points[name] for name in self.summary["lines"][index]["points"]]
        # A logged share is a few rows off; with two decimals, shares below 1 % would be 0.
        return {_digits(point["replay_share"]): point for point in named}

    def forgetting(self, point: Mapping[str, Any]) -> Spread:
        found: Spread = point["sources"][self.replay]["forgetting"]
        return found

    def loss(self, point: Mapping[str, Any]) -> Spread:
        found: Spread = point["sources"][self.task]["held_out_loss"]
        return found


def _digits(share: float) -> float:
    return round(share, 2 if share >= 0.009 else 4)


def study_of(path: Path) -> Study:
    """The study in a file; replay source and task are those of the first frontier.

    Ends the program where the summary lacks what the study needs.
    """
    summary = json.loads(path.read_text())
    if not summary.get("frontiers") or not summary.get("lines"):
        sys.exit(
            f"error: {path} has no frontier; compare a sweep of a replay source's share, with 0"
            " among its values"
        )
    title, frontier = next(iter(summary["frontiers"].items()))
    study = Study(summary=summary, replay=frontier["replay"], task=title.split(" against ")[0])
    if not {0.0} < set(study.line()):
        sys.exit(
            f"error: {path} has the shares {sorted(study.line())}; 0, the one-way run, and a"
            " larger one are needed"
        )
    return study


def shown(found: Spread) -> str:
    deviation = "" if found["deviation"] is None else f" ± {found['deviation']:.3f}"
    return f"{found['mean']:.3f}{deviation}"
