"""Folders as finished runs leave them, with numbers from known formulas; nothing is trained."""

import json
import math
import random
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

STEPS, TASK_ROWS, ROW_TOKENS = 400, 8, 256
TASK_TOKENS = STEPS * TASK_ROWS * ROW_TOKENS
BASE = {"gsm8k": 4.35, "banking77": 5.1, "books": 3.2, "wiki": 3.6}
AT_ZERO, B, ALPHA = 1.1, 60.0, 0.9  # forgetting of `books` one-way, and the law for replay


def law(share: float) -> float:
    """The forgetting of `books` at a share of replay."""
    return AT_ZERO * (1 + B * share) ** -ALPHA


@dataclass(frozen=True, kw_only=True)
class Numbers:
    """The last numbers of a run: forgetting of books, task losses relative to one-way, scores."""

    forgetting: float
    task_loss: float = 0.0
    exact_match: float = 0.31
    accuracy: float = 0.72


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """How the recipe of one run differs from those of the others."""

    share: float = 0.0
    seed: int = 0
    train: Mapping[str, Any] = field(default_factory=dict)
    more: Mapping[str, Any] = field(default_factory=dict)
    replay: str = "books"


def write_run(
    folder: Path, recipe: Recipe, numbers: Numbers, *, steps: int = STEPS, samples: bool = True
) -> Path:
    """Write a run of `gsm8k` and `banking77` with replay of `books`; `wiki` is only evaluated."""
    folder.mkdir(parents=True)
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe_tree(folder, recipe)))
    noise = random.Random(zlib.crc32(str((recipe, numbers)).encode()))
    shift = noise.gauss(0, 0.012)
    lines: list[Mapping[str, Any]] = [evaluation(0, recipe, numbers, shift)]
    for step in range(40, steps + 1, 40):
        lines += [training(step, recipe), evaluation(step, recipe, numbers, shift)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    if samples:
        for step in (0, steps):
            write_samples(folder, step, numbers, noise)
    return folder


def recipe_tree(folder: Path, recipe: Recipe) -> dict[str, Any]:
    """The recipe as a run resolves it; `books` without a share is only evaluated."""
    sources: dict[str, Any] = {
        name: {
            "path": f"data/{name}",
            "role": "task",
            "share": (1 - recipe.share) / 2,
            "held_out": f"data/{name}-test",
        }
        for name in ("gsm8k", "banking77")
    }
    held_out = {"wiki": "data/wiki-test"}
    if recipe.share:
        sources[recipe.replay] = {
            "path": f"data/{recipe.replay}",
            "role": "replay",
            "share": recipe.share,
        }
    if not recipe.share or recipe.replay != "books":
        held_out["books"] = "data/books-test"
    else:
        sources["books"]["held_out"] = "data/books-test"
    return {
        "model": {"path": "runs/base/export"},
        "objective": "per_source",
        "sequence_length": ROW_TOKENS,
        "sources": sources,
        "held_out": held_out,
        "budget": {"task_tokens": TASK_TOKENS, "total_tokens": None, "steps": None},
        "train": {"lr": 1e-3, "schedule": "cosine", "steps": None, "ema": None, **recipe.train},
        "seed": recipe.seed,
        "output": str(folder),
        **recipe.more,
    }


def training(step: int, recipe: Recipe) -> dict[str, Any]:
    line: dict[str, Any] = {"step": step, "loss": 2.0}
    parts = {"gsm8k": (1 - recipe.share) / 2, "banking77": (1 - recipe.share) / 2}
    if recipe.share:
        parts[recipe.replay] = recipe.share
    rows = TASK_ROWS / (1 - recipe.share) * step
    for name, part in parts.items():
        tokens = round(part * rows * ROW_TOKENS)
        line |= {
            f"total_rows/{name}": part * rows,
            f"total_tokens/{name}": tokens,
            f"total_loss_tokens/{name}": tokens if name == recipe.replay else tokens // 3,
            f"gradient_share/{name}": part,
        }
    return line


def evaluation(step: int, recipe: Recipe, numbers: Numbers, shift: float) -> dict[str, Any]:
    """The line of an evaluation; losses and scores approach their last values exponentially."""
    part = (1 - math.exp(-4 * step / STEPS)) / (1 - math.exp(-4))
    ends = {
        "gsm8k": -1.8 + numbers.task_loss + shift / 2,
        "banking77": -4.6 + numbers.task_loss / 3 + shift / 4,
        "books": numbers.forgetting * (1 + shift),
        "wiki": 0.8 * numbers.forgetting * (1 + shift) + 0.05,
    }
    line: dict[str, Any] = {"step": step, "eval": True}
    for name, end in ends.items():
        loss = BASE[name] + end * part
        measures = {
            "perplexity": math.exp(loss),
            "bits_per_byte": loss / 4.4,
            "token_accuracy": 1 / (1 + loss),
        }
        line |= {f"held_out_loss/{name}": loss, f"forgetting/{name}": end * part}
        line |= around("held_out", name, loss, 0.02) | around("forgetting", name, end * part, 0.01)
        for measure, value in measures.items():
            line |= {f"{measure}/{name}": value} | around(measure, name, value, 0.02 * value)
        line |= {f"held_out_tokens/{name}": 20_000, f"held_out_documents/{name}": 300}
    scores = {
        "gsm8k/exact_match": numbers.exact_match + shift,
        "banking77/accuracy": numbers.accuracy + shift,
        "banking77/macro_f1": numbers.accuracy - 0.06 + shift,
    }
    for name, score in scores.items():
        value = 0.01 + (score - 0.01) * part
        line |= {
            f"task/{name}": value,
            f"task_low/{name}": value - 0.03,
            f"task_high/{name}": value + 0.03,
        }
    return line | {"task_examples/gsm8k": 200, "task_examples/banking77": 400}


def around(measure: str, name: str, value: float, half: float) -> dict[str, float]:
    """The two ends of an interval, `half` from its middle."""
    return {f"{measure}_low/{name}": value - half, f"{measure}_high/{name}": value + half}


def write_samples(folder: Path, step: int, numbers: Numbers, noise: random.Random) -> None:
    """Write eight outputs of each task."""
    for task, right in (("gsm8k", numbers.exact_match), ("banking77", numbers.accuracy)):
        lines = []
        for index in range(8):
            is_right = step > 0 and noise.random() < right
            answer = str(12 + index) if is_right else str(noise.randint(1, 90))
            lines.append(
                {
                    "prompt": (
                        f"Question: Mona has {index + 5} apples & buys 7 more. How many has she"
                        " <now>?\nAnswer:"
                    ),
                    "references": [f"She has {index + 5} + 7 = {12 + index}.\n#### {12 + index}"],
                    "outputs": [
                        f"She has {index + 5} + 7 = {answer} apples now. " * (1 + 24 * (index == 2))
                        + f"\n#### {answer}"
                    ],
                    "scores": {"exact_match": float(is_right)},
                }
            )
        path = folder / "samples" / task / f"step-{step:06d}.jsonl"
        path.parent.mkdir(parents=True, exist_ok=True)
        text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
        path.write_text(text, encoding="utf-8")


def write_evaluation(
    folder: Path, recipe: Recipe, numbers: Numbers, *, model: str, with_base: bool = True
) -> Path:
    """Write the evaluation of a model outside of a run."""
    folder.mkdir(parents=True)
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe_tree(Path("runs/tuned"), recipe)))
    lines = [evaluation(0, recipe, numbers, 0.0)] if with_base else []
    found = {
        "version": 1,
        "model": model,
        "base": "runs/base/export" if with_base else None,
        "command": f"bigmix evaluate recipe.yaml --model {model} --base runs/base/export",
        "lines": [*lines, evaluation(STEPS, recipe, numbers, 0.0)],
    }
    (folder / "evaluation.json").write_text(json.dumps(found))
    return folder


SHARES = (0.0, 0.01, 0.02, 0.05, 0.1, 0.25, 0.5, 0.75)


def write_sweep(folder: Path, *, shares: Sequence[float] = SHARES, seeds: int = 3) -> Path:
    """Write a sweep over the share, and next to it six remedies with one seed each."""
    for share in shares:
        for seed in range(seeds):
            numbers = Numbers(
                forgetting=law(share), task_loss=0.01 * share, exact_match=0.31 - 0.02 * share
            )
            write_run(
                folder / f"books-{share:g}" / f"seed-{seed}",
                Recipe(share=share, seed=seed),
                numbers,
            )
    remedies = {
        "lr-3e-4": (
            Recipe(train={"lr": 3e-4}),
            Numbers(forgetting=0.42, task_loss=0.5, exact_match=0.19, accuracy=0.5),
        ),
        "lr-1e-4": (
            Recipe(train={"lr": 1e-4}),
            Numbers(forgetting=0.2, task_loss=0.9, exact_match=0.1, accuracy=0.31),
        ),
        "kl-1": (
            Recipe(more={"reference": {"model": None, "sources": {"gsm8k": 1.0}}}),
            Numbers(forgetting=0.17, task_loss=0.33, exact_match=0.22, accuracy=0.6),
        ),
        "ema-0.999": (
            Recipe(train={"ema": 0.999}),
            Numbers(forgetting=0.9, task_loss=0.02, accuracy=0.71),
        ),
        "self-replay": (
            Recipe(share=0.05, replay="self"),
            Numbers(forgetting=0.4, task_loss=0.005, exact_match=0.3),
        ),
    }
    for name, (recipe, numbers) in remedies.items():
        write_run(folder / name / "seed-0", recipe, numbers)
    write_evaluation(
        folder / "average-0.5",
        Recipe(),
        Numbers(forgetting=0.3, task_loss=0.4, exact_match=0.2, accuracy=0.55),
        model="runs/average-0.5",
    )
    return folder
