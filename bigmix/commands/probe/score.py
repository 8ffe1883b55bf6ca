"""Measures the share of the planted facts that a model recalls."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from bigmix.cluster.collectives import Cluster
from bigmix.cluster.signals import UNWATCHED
from bigmix.cluster.world import World
from bigmix.commands.probe.plant import NEW_QUESTIONS, QUESTIONS, SETTINGS
from bigmix.errors import BadInput
from bigmix.evaluation.bootstrap import interval, resampled_sums
from bigmix.evaluation.tasks.examples import open_tasks
from bigmix.evaluation.tasks.inference_model import InferenceModel
from bigmix.evaluation.tasks.prompts import PreparedTask, chat_format_of, tokenise_tasks
from bigmix.evaluation.tasks.runner import score_tasks
from bigmix.model.causal_lm import max_positions
from bigmix.model.loading import open_whole
from bigmix.recipe.task import Task
from bigmix.seeding import key_of

Wording = Literal["planted", "new"]
_FILES: Mapping[Wording, str] = {"planted": QUESTIONS, "new": NEW_QUESTIONS}
_MAX_TOKENS = 16  # a value is a word or two


@dataclass(frozen=True, kw_only=True, slots=True)
class Recall:
    """The share of the facts that a model recalls, from 0 to 1, with the ends of its 95 % interval
    over facts, and the number of facts. The fields are keys of the JSON output.
    """

    value: float
    low: float
    high: float
    facts: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Recalled:
    """The recall of a model for questions in one kind of wording, over all facts and by attribute.

    The fields are keys of the JSON output.
    """

    everything: Recall
    attributes: Mapping[str, Recall]


def recall(model: str, probe: Path, *, batch_rows: int) -> dict[Wording, Recalled]:
    """Let a model complete a sentence about every planted fact, in words that were planted and in
    new ones, greedily up to the full stop.

    Raises BadInput where there is no probe, or no model with a tokenizer.
    """
    settings = _settings(probe)
    tasks = {
        str(wording): Task(
            path=str(probe / file),
            scores=("exact_match",),
            format="text",
            stop=(settings["stop"],),
            max_new_tokens=_MAX_TOKENS,
            batch_rows=batch_rows,
            samples=len(_attributes(probe / file)),
        )
        for wording, file in _FILES.items()
    }
    inference_model, num_positions = _open(model)
    prepared = tokenise_tasks(open_tasks(tasks), chat_format_of(model, []), num_positions)
    is_recalled = _is_recalled(inference_model, prepared)
    return {
        wording: _recalled(is_recalled[wording], _attributes(probe / file))
        for wording, file in _FILES.items()
    }


def _settings(probe: Path) -> Mapping[str, Any]:
    path = probe / SETTINGS
    if not path.is_file():
        raise BadInput(
            f"{probe} holds no probe: there is no {SETTINGS} in it; make one with `bigmix probe"
            " make`"
        )
    settings: Mapping[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return settings


def _attributes(path: Path) -> list[str]:
    """The attribute that each question is about."""
    lines = path.read_text(encoding="utf-8").splitlines()
    return [json.loads(line)["attribute"] for line in lines]


def _open(model: str) -> tuple[InferenceModel, int | None]:
    """The model in this process, in the precision in which it is stored, and the number of its
    positions.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    lm = open_whole(model, dtype="auto", device=device)
    return InferenceModel(lm=lm, device=device), max_positions(lm.config)


def _is_recalled(
    model: InferenceModel, tasks: Mapping[str, PreparedTask]
) -> dict[str, list[float]]:
    """1 for each fact that is recalled, 0 for each that is not, in the order of the questions."""
    results = score_tasks(
        model,
        Cluster(World(rank=0, local_rank=0, size=1, local_size=1)),
        tasks,
        seed=0,
        activity=UNWATCHED,
    )
    assert results is not None, "no stop can be requested"
    return {
        name: [sample.scores["exact_match"] for sample in result.samples]
        for name, result in results.items()
    }


def _recalled(is_recalled: list[float], attributes: list[str]) -> Recalled:
    by_attribute: dict[str, list[float]] = {}
    for value, attribute in zip(is_recalled, attributes, strict=True):
        by_attribute.setdefault(attribute, []).append(value)
    return Recalled(
        everything=_recall_over("all", is_recalled),
        attributes={name: _recall_over(name, values) for name, values in by_attribute.items()},
    )


def _recall_over(name: str, values: list[float]) -> Recall:
    values_N1 = np.array(values)[:, None]
    low, high = interval(resampled_sums(values_N1, key_of("recall", name))[:, 0] / len(values))
    return Recall(value=float(np.mean(values)), low=low, high=high, facts=len(values))
