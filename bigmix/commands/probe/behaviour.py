"""Puts general prompts to a model, and to the base that its answers are compared with."""

import gc
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from bigmix.cluster.collectives import Cluster
from bigmix.cluster.signals import UNWATCHED
from bigmix.cluster.world import World
from bigmix.errors import BadInput
from bigmix.evaluation.behaviour.answers import Respondent, left_out_note, prepare_behaviour
from bigmix.evaluation.behaviour.inputs import BehaviourInputs, has_chat_template, open_behaviour
from bigmix.evaluation.behaviour.measure import (
    BehaviourResult,
    answers_of_base,
    behaviour_line,
    measure_behaviour,
    result_of_base,
    write_pairs,
)
from bigmix.evaluation.tasks.inference_model import InferenceModel
from bigmix.files import replace_text
from bigmix.model.causal_lm import choose_dtype, max_positions, read_config
from bigmix.model.loading import open_whole
from bigmix.recipe.sections import Behaviour
from bigmix.runs.layout import BEHAVIOUR, step_of_export
from bigmix.runs.metrics_log import MetricsRecord, finite
from bigmix.text.tokenizer import fingerprint_of

_VERSION = 1
_RESULT = f"{BEHAVIOUR}.json"


@dataclass(frozen=True, kw_only=True, slots=True)
class ProbedModel:
    """A model, the step that its result has in files, and the result."""

    path: str
    step: int
    result: BehaviourResult

    @property
    def line(self) -> MetricsRecord:
        """The result under the keys of an evaluation line."""
        return {"step": self.step, "eval": True} | behaviour_line(self.result)


def probe_behaviour(
    model: str,
    base: str | None,
    settings: Behaviour,
    *,
    output: Path | None,
    note: Callable[[str], None],
) -> Iterator[ProbedModel]:
    """The behaviour of the base, if there is one, and of the model, which is compared with it.

    With an output the answers are written to files in this folder. `note` is given a line about
    what is done. Raises BadInput where one of them is no chat model, or where they do not have the
    same tokens.
    """
    probe = prepare_behaviour(*_checked(model, base, settings))
    if probe.left_out:
        note(left_out_note(probe))
    answers, num_prompts = None, len(probe.chat.prompts)
    if base is not None:
        note(f"{base} answers {num_prompts} prompts")
        answers = answers_of_base(_respondent(base), probe)
        assert answers is not None, "no stop can be requested"
        probed = ProbedModel(path=base, step=0, result=result_of_base(probe, answers))
        if output is not None:
            answers.write(output)
            write_pairs(output, probed.step, probed.result)
        yield probed
        gc.collect()  # the base, of which parts refer to one another
    note(f"{model} answers {num_prompts} prompts")
    found = measure_behaviour(_respondent(model), probe, answers)
    assert found is not None, "no stop can be requested"
    probed = ProbedModel(path=model, step=step_of_export(Path(model)), result=found)
    if output is not None:
        write_pairs(output, probed.step, found)
    yield probed


def result_tree(model: str, base: str | None, lines: Sequence[MetricsRecord]) -> dict[str, Any]:
    """The results as plain values; None in place of numbers that are not finite."""
    return {
        "version": _VERSION,
        "model": model,
        "base": base,
        "lines": [finite(line) for line in lines],
    }


def write_result(output: Path, tree: dict[str, Any]) -> None:
    """Write the results as JSON; last, so that a folder with this file is complete."""
    replace_text(output / _RESULT, json.dumps(tree, indent=1, allow_nan=False) + "\n")


def _checked(
    model: str, base: str | None, settings: Behaviour
) -> tuple[BehaviourInputs, int | None]:
    """The prompts, and the positions that both models have."""
    paths = [model] if base is None else [base, model]
    configs = [read_config(path, None, key="the model") for path in paths]
    faults = [
        f"no chat template is in the tokenizer of {path}; give a model that answers chats"
        for path in paths
        if not has_chat_template(path)
    ]
    if base is not None and fingerprint_of(model) != fingerprint_of(base):
        faults.append(
            f"{model} and {base} have different tokenizers, so that one has no loss on the answers"
            " of the other; give the base that the model was trained from"
        )
    elif len({config.vocab_size for config in configs}) > 1:
        sizes = " and ".join(str(config.vocab_size) for config in configs)
        faults.append(
            f"{base} and {model} have vocabularies of {sizes}, and a divergence needs the same one;"
            " give the base that the model was trained from"
        )
    if faults:
        raise BadInput(*faults)
    inputs = open_behaviour(settings, paths[0])
    assert inputs is not None, "the first model has a chat template"
    limits = [limit for config in configs if (limit := max_positions(config)) is not None]
    return inputs, min(limits, default=None)


def _respondent(path: str) -> Respondent:
    """A model alone in this process."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    lm = open_whole(path, dtype=choose_dtype("auto", device).value, device=device)
    return Respondent(
        model=InferenceModel(lm=lm, device=device),
        cluster=Cluster(World(rank=0, local_rank=0, size=1, local_size=1)),
        activity=UNWATCHED,
    )
