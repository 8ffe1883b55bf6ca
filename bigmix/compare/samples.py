"""A run's folder goes in; out come the outputs that its tasks kept, to be laid side by side."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from bigmix.errors import BadInput

SAMPLES = "samples"


@dataclass(frozen=True, kw_only=True, slots=True)
class Sample:
    """One example of a task: what was asked, what would be right, what came out, and its scores by name."""

    prompt: str
    references: Sequence[str]
    outputs: Sequence[str]
    scores: Mapping[str, float]


def read_samples(folder: Path, step: int) -> dict[str, list[Sample]]:
    """The samples of each task at a step; a task without any is absent."""
    return {
        path.parent.name: _read(path)
        for path in sorted((folder / SAMPLES).glob(f"*/step-{step:06d}.jsonl"))
    }


def _read(path: Path) -> list[Sample]:
    samples = []
    # Not splitlines, which also divides at line ends that stand inside of a text.
    lines = path.read_text(encoding="utf-8", errors="replace").split("\n")
    for number, raw in enumerate(lines[:-1], start=1):
        try:
            line = json.loads(raw)
            sample = Sample(
                prompt=str(line["prompt"]),
                references=[str(text) for text in line["references"]],
                outputs=[str(text) for text in line["outputs"]],
                scores={name: float(value) for name, value in line["scores"].items()},
            )
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise BadInput(
                f"{path}:{number} is {raw[:60]!r}; each line must be a JSON object with prompt, references, outputs and "
                "scores; delete the file to compare without its samples"
            ) from error
        samples.append(sample)
    return samples
