"""Runs tasks on a model and scores the answers, over ranks or in a single process."""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from bigmix.cluster.collectives import Cluster
from bigmix.cluster.signals import Activity
from bigmix.cluster.world import World
from bigmix.evaluation.bootstrap import Estimate
from bigmix.evaluation.tasks.execution import passes, program_of
from bigmix.evaluation.tasks.generation import GenerationSettings, Prompt, generate
from bigmix.evaluation.tasks.inference_model import InferenceModel, RankBatch, batches_of_rank
from bigmix.evaluation.tasks.likelihood import log_likelihoods
from bigmix.evaluation.tasks.prompts import PreparedTask, Question
from bigmix.evaluation.tasks.scoring import Answered, score_answers, scored
from bigmix.files import replace_text
from bigmix.runs.layout import SAMPLES
from bigmix.seeding import evenly_spaced, key_of


@dataclass(frozen=True, kw_only=True, slots=True)
class Sample:
    """One example with the model's answers; `scores` are those that have a value for a single
    example.
    """

    prompt: str
    references: tuple[str, ...]
    outputs: tuple[str, ...]
    scores: Mapping[str, float]


@dataclass(frozen=True, kw_only=True, slots=True)
class TaskResult:
    """The scores of a task over its examples; `num_dropped` more do not fit the positions of the
    model.
    """

    scores: Mapping[str, Estimate]
    num_examples: int
    num_dropped: int
    samples: Sequence[Sample]


def score_tasks(
    model: InferenceModel,
    cluster: Cluster,
    tasks: Mapping[str, PreparedTask],
    *,
    seed: int,
    activity: Activity,
) -> dict[str, TaskResult] | None:
    """Answer every task and score the answers; a collective, with the same results on all ranks.

    None where a stop was requested on any rank, which is checked before each batch. `model` is what
    `gathered_for_inference` gives for a model under an engine, or InferenceModel(lm=lm,
    device=device) for one that is loaded whole.
    """
    results = {}
    for name, prepared in tasks.items():
        outputs = _outputs_of_rank(model, cluster, name, prepared, seed=seed, activity=activity)
        if outputs is None:
            return None
        activity.begin(f"scores of {name}")
        everything = [output for part in cluster.gather(outputs) for output in part]
        # On one rank: resampling the examples a thousand times takes seconds.
        result = _scored(name, prepared, everything) if cluster.world.is_first else None
        results[name] = cluster.gather(result)[0]
    return results


def task_line(results: Mapping[str, TaskResult]) -> dict[str, float | int | bool | None]:
    """The results of tasks under the keys of an evaluation line."""
    line: dict[str, float | int | bool | None] = {}
    for name, result in results.items():
        for kind, score in result.scores.items():
            line[f"task/{name}/{kind}"] = score.value
            line[f"task_low/{name}/{kind}"] = score.low
            line[f"task_high/{name}/{kind}"] = score.high
        line[f"task_examples/{name}"] = result.num_examples
        if result.num_dropped:
            line[f"task_dropped/{name}"] = result.num_dropped
    return line


def write_samples(folder: Path, step: int, results: Mapping[str, TaskResult]) -> None:
    """Write the sample outputs of an evaluation to samples/TASK/step-NNNNNN.jsonl in a folder."""
    for name, result in results.items():
        if result.samples:
            task_folder = folder / SAMPLES / name
            task_folder.mkdir(parents=True, exist_ok=True)
            lines = [_as_json(sample) for sample in result.samples]
            replace_text(
                task_folder / f"step-{step:06d}.jsonl", "".join(f"{line}\n" for line in lines)
            )


def _as_json(sample: Sample) -> str:
    return json.dumps(
        {
            "prompt": sample.prompt,
            "references": sample.references,
            "outputs": sample.outputs,
            "scores": sample.scores,
        },
        ensure_ascii=False,
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class _Output:
    """Output `number` of an example, and whether its program passes."""

    index: int
    number: int
    text: str
    passes: bool


def _batches(prepared: PreparedTask, world: World) -> Sequence[RankBatch[tuple[Question, int]]]:
    """The rows (question, number of the output) of a rank; questions of similar lengths together,
    the longest first.
    """
    task = prepared.task
    num_outputs, size = task.outputs, task.batch_rows
    if task.by == "likelihood":
        # Here each label is a row, and all labels of a question are in one batch.
        num_outputs, size = 1, max(1, size // len(prepared.labels))
    ordered = sorted(prepared.questions, key=lambda q: (-len(q.prompt), q.example.index))
    rows = [(question, number) for question in ordered for number in range(num_outputs)]
    return batches_of_rank(rows, world, size)


def _outputs_of_rank(
    model: InferenceModel,
    cluster: Cluster,
    name: str,
    prepared: PreparedTask,
    *,
    seed: int,
    activity: Activity,
) -> list[_Output] | None:
    """The outputs of this rank's batches; None on all ranks where a stop was requested on one."""
    batches = _batches(prepared, cluster.world)
    outputs: list[_Output] = []
    for number, batch in enumerate(batches, 1):
        activity.begin(f"task {name}, batch {number} of {len(batches)}")
        if any(cluster.sum_counts([activity.stop_requested()])):
            return None
        if batch.is_idle and not model.in_step:
            continue
        texts = _answers(model, prepared, batch.rows, key_of(seed, "task", name))
        if not batch.is_idle:
            outputs += _outputs(
                prepared, batch.rows, texts, lambda: activity.begin(f"programs of {name}")
            )
    return outputs


def _answers(
    model: InferenceModel, prepared: PreparedTask, rows: Sequence[tuple[Question, int]], key: int
) -> list[str]:
    """The model's answer to each row."""
    if prepared.task.by == "likelihood":
        questions = [question for question, _ in rows]
        return [
            prepared.labels[int(np.argmax(_normalised(prepared, question, values)))]
            for question, values in zip(questions, log_likelihoods(model, questions), strict=True)
        ]
    prompts = [
        Prompt(tokens=question.prompt, key=key_of(key, question.example.index, number))
        for question, number in rows
    ]
    outputs = generate(model, prepared.tokenizer, _settings(prepared), prompts)
    # The spaces around a chat's answer come from the template; those of a text may belong to code.
    return [output.text.strip() if prepared.is_chat else output.text for output in outputs]


def _settings(prepared: PreparedTask) -> GenerationSettings:
    task = prepared.task
    return GenerationSettings(
        stops=prepared.stops,
        max_new_tokens=task.max_new_tokens,
        temperature=task.temperature,
        top_p=task.top_p,
        stop_texts=task.stop,
    )


def _normalised(prepared: PreparedTask, question: Question, values: Sequence[float]) -> list[float]:
    """The log-likelihoods of the labels, divided as length_normalise of the task says."""
    lengths = {
        "none": [1] * len(values),
        "tokens": [len(tokens) for tokens in question.labels],
        "bytes": [len(label.encode()) for label in prepared.labels],
    }[prepared.task.length_normalise]
    return [value / length for value, length in zip(values, lengths, strict=True)]


def _outputs(
    prepared: PreparedTask,
    rows: Sequence[tuple[Question, int]],
    texts: Sequence[str],
    on_program: Callable[[], None],
) -> Iterator[_Output]:
    """The texts as outputs; `on_program` is called before each program runs, since one may take
    until its timeout.
    """
    for (question, number), text in zip(rows, texts, strict=True):
        is_passed = False
        if prepared.task.passes_at:
            on_program()
            is_passed = _passes(prepared, question, text)
        yield _Output(index=question.example.index, number=number, text=text, passes=is_passed)


def _passes(prepared: PreparedTask, question: Question, text: str) -> bool:
    example, task = question.example, prepared.task
    program = program_of(text, None if prepared.is_chat else example.shown, example.test)
    return passes(program, timeout_s=task.execute_timeout_s, memory_mib=task.execute_memory_mib)


def _scored(name: str, prepared: PreparedTask, outputs: Sequence[_Output]) -> TaskResult:
    """The result of a task from the outputs of all ranks."""
    by_example: dict[int, list[_Output]] = {}
    for output in sorted(outputs, key=lambda output: (output.index, output.number)):
        by_example.setdefault(output.index, []).append(output)
    examples = {question.example.index: question.example for question in prepared.questions}
    answered = [
        Answered(
            example=examples[index],
            outputs=tuple(output.text for output in own),
            num_passed=sum(output.passes for output in own),
        )
        for index, own in by_example.items()
    ]
    by_score = {
        kind: score_answers(kind, answered, prepared.task, prepared.labels)
        for kind in prepared.task.scores
    }
    samples = [
        Sample(
            prompt=answered[at].example.shown,
            references=answered[at].example.references,
            outputs=answered[at].outputs,
            scores={
                kind: float(score.values_N[at])
                for kind, score in by_score.items()
                if score.values_N is not None
            },
        )
        for at in evenly_spaced(range(len(answered)), prepared.task.samples)
    ]
    return TaskResult(
        scores={kind: scored(f"{name}/{kind}", each) for kind, each in by_score.items()},
        num_examples=len(answered),
        num_dropped=prepared.num_dropped,
        samples=samples,
    )
