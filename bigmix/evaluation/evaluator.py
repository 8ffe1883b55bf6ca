"""Evaluates a model on held-out sources, tasks and general prompts, for a line of metrics.jsonl."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bigmix.cluster.collectives import Cluster
from bigmix.cluster.signals import Activity
from bigmix.data.shards.manifest import Manifest
from bigmix.errors import BadInput
from bigmix.evaluation.behaviour.answers import BehaviourProbe, Respondent
from bigmix.evaluation.behaviour.measure import (
    BehaviourResult,
    answers_of_base,
    behaviour_line,
    measure_behaviour,
    result_of_base,
)
from bigmix.evaluation.bootstrap import Estimate
from bigmix.evaluation.forward import HeldOutSpec, evaluate
from bigmix.evaluation.held_out import Baseline, HeldOutResult, summarise
from bigmix.evaluation.tasks.examples import TaskFile
from bigmix.evaluation.tasks.inference_model import WeightPlacement, gathered_for_inference
from bigmix.evaluation.tasks.prompts import PreparedTask, chat_format_of, tokenise_tasks
from bigmix.evaluation.tasks.runner import TaskResult, score_tasks, task_line
from bigmix.model.causal_lm import max_positions
from bigmix.model.engine import Evaluable
from bigmix.runs.metrics_log import MetricsRecord
from bigmix.text.last_word import pieces_of_tokens
from bigmix.text.tokenizer import load_tokenizer

_MEASURES = (  # of `HeldOutResult`, those that have the same name in an evaluation line
    "perplexity",
    "bits_per_byte",
    "token_accuracy",
    "last_word_accuracy",
    "kl_to_base",
    "forgetting",
)


def held_out_numbers(results: Mapping[str, HeldOutResult]) -> MetricsRecord:
    """The results of held-out sources under the keys of an evaluation line."""
    line: MetricsRecord = {}
    for name, result in results.items():
        line |= _numbers("held_out_loss", "held_out", name, result.loss)
        for key in _MEASURES:
            estimate: Estimate | None = getattr(result, key)
            if estimate is not None:
                line |= _numbers(key, key, name, estimate)
        line[f"held_out_tokens/{name}"] = result.num_tokens
        line[f"held_out_documents/{name}"] = result.num_documents
        if result.last_word_accuracy is not None:
            line[f"last_words/{name}"] = result.num_last_words
    return line


def _numbers(key: str, interval_key: str, source: str, estimate: Estimate) -> MetricsRecord:
    return {
        f"{key}/{source}": estimate.value,
        f"{interval_key}_low/{source}": estimate.low,
        f"{interval_key}_high/{source}": estimate.high,
    }


@dataclass(frozen=True, kw_only=True, slots=True)
class EvaluationResult:
    """The results of an evaluation; `line` has all numbers, under the keys of metrics.jsonl.

    `behaviour` is None where it was not measured.
    """

    held_out: Mapping[str, HeldOutResult]
    tasks: Mapping[str, TaskResult]
    behaviour: BehaviourResult | None
    line: MetricsRecord


@dataclass(frozen=True, kw_only=True, slots=True)
class Asked:
    """What a model answers in an evaluation: tasks, by name, and whether the behaviour probe."""

    tasks: Collection[str]
    behaviour: bool

    @property
    def is_empty(self) -> bool:
        """Whether it answers nothing."""
        return not self.tasks and not self.behaviour


@dataclass(frozen=True, kw_only=True, slots=True)
class Evaluator:
    """Evaluates one model on held-out sources, tasks and general prompts, in a run or outside of
    one.

    `behaviour` is None where it is not measured. `weights` is how the weights are held while the
    model answers, `seed` that of sampled answers to tasks.
    """

    engine: Evaluable
    cluster: Cluster
    held_out: HeldOutSpec
    tasks: Mapping[str, PreparedTask]
    behaviour: BehaviourProbe | None
    weights: WeightPlacement
    seed: int

    def evaluate(
        self,
        step: int,
        base: Baseline | None,
        activity: Activity,
        asked: Asked | None = None,
    ) -> EvaluationResult | None:
        """Evaluate the model after a step; a collective. None where a stop was requested.

        Forgetting is measured from `base`, which takes the result of a source that it does not have
        yet, and before the first step the model's answers; it is not measured where `base` is None.
        `asked` is what the model answers; None: everything.
        """
        sums = evaluate(self.engine, self.cluster, self.held_out, activity)
        if sums is None:
            return None
        held_out = {}
        for name, of_documents in sums.items():
            if base is not None:
                base.take(name, of_documents)
            manifest = self.held_out.held_out[name].manifest
            held_out[name] = summarise(
                name,
                of_documents,
                tokens_per_byte=manifest.loss_tokens / max(manifest.loss_bytes, 1),
                base=base,
            )
        answered = self._answered(asked or self.everything, step, base, activity)
        if answered is None:
            return None
        line = {"step": step, "eval": True} | held_out_numbers(held_out) | task_line(answered.tasks)
        if answered.behaviour is not None:
            line |= behaviour_line(answered.behaviour)
        return EvaluationResult(
            held_out=held_out, tasks=answered.tasks, behaviour=answered.behaviour, line=line
        )

    @property
    def everything(self) -> Asked:
        """All tasks, and the behaviour probe where there is one."""
        return Asked(tasks=frozenset(self.tasks), behaviour=self.behaviour is not None)

    def _answered(
        self, asked: Asked, step: int, base: Baseline | None, activity: Activity
    ) -> "_Answered | None":
        """What the model answers; None where a stop was requested."""
        if asked.is_empty:
            return _Answered(tasks={}, behaviour=None)
        activity.begin("gathering the weights for answers")
        engine, behaviour = self.engine, None
        with (
            engine.evaluating(),
            gathered_for_inference(
                engine.module.lm, engine.device, self.cluster, self.weights
            ) as model,
        ):
            chosen = {name: task for name, task in self.tasks.items() if name in asked.tasks}
            tasks = score_tasks(model, self.cluster, chosen, seed=self.seed, activity=activity)
            if tasks is None:
                return None
            if asked.behaviour and self.behaviour is not None:
                respondent = Respondent(model=model, cluster=self.cluster, activity=activity)
                behaviour = _behaviour_of(respondent, self.behaviour, step, base)
                if behaviour is None:
                    return None
        return _Answered(tasks=tasks, behaviour=behaviour)


@dataclass(frozen=True, kw_only=True, slots=True)
class _Answered:
    """The results of tasks, and of the behaviour probe where it was asked."""

    tasks: Mapping[str, TaskResult]
    behaviour: BehaviourResult | None


def _behaviour_of(
    respondent: Respondent, probe: BehaviourProbe, step: int, base: Baseline | None
) -> BehaviourResult | None:
    """The behaviour after a step; before the first one the model is the base. None where a stop was
    requested.
    """
    if base is None or step > 0:
        return measure_behaviour(respondent, probe, None if base is None else base.answers)
    answers = answers_of_base(respondent, probe)
    if answers is None:
        return None
    base.answers = answers
    return result_of_base(probe, answers)


def prepare_tasks(
    files: Mapping[str, TaskFile],
    tokenizer_folder: Path,
    tokenizer: str | None,
    manifests: Sequence[Manifest],
    config: Any,
) -> dict[str, PreparedTask]:
    """The tasks as tokens for a model of this configuration; `tokenizer`, a folder or hub name, is
    used where the folder of the sources has none.

    Raises BadInput where there is no tokenizer, or a prompt does not fit the positions of the
    model.
    """
    if not files:
        return {}
    chosen = str(tokenizer_folder) if tokenizer_folder.is_dir() else tokenizer
    if chosen is None:
        raise BadInput(
            "tasks need a tokenizer, and neither the sources nor the model have one; prepare the"
            " sources again, or set model.tokenizer"
        )
    return tokenise_tasks(files, chat_format_of(chosen, manifests), max_positions(config))


def token_bytes_in(folder: Path) -> Sequence[bytes] | None:
    """The bytes of each id of the tokenizer in a folder; None where there is no such folder."""
    return pieces_of_tokens(load_tokenizer(str(folder))) if folder.is_dir() else None


@dataclass(frozen=True, kw_only=True, slots=True)
class BaselineEvaluation:
    """The evaluation of a run before its first step, the baseline of its forgetting, and its
    folder.
    """

    found: EvaluationResult
    base: Baseline
    folder: Path
