"""Tasks and a model go in, their scores and outputs come out; over ranks, and in a process of its
own alike.
"""

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
from bigmix.evaluation.tasks.generation import Prompt, generate
from bigmix.evaluation.tasks.inference_model import InferenceModel
from bigmix.evaluation.tasks.likelihood import log_likelihoods
from bigmix.evaluation.tasks.prompts import PreparedTask, Question
from bigmix.evaluation.tasks.scoring import Answered, score_answers, scored
from bigmix.files import replace_text
from bigmix.runs.layout import SAMPLES
from bigmix.seeding import evenly_spaced, key_of


@dataclass(frozen=True, kw_only=True, slots=True)
class Sample:
    """One example with what the model has answered; `scores` are those that an example has by
    itself.
    """

    prompt: str
    references: tuple[str, ...]
    outputs: tuple[str, ...]
    scores: Mapping[str, float]


@dataclass(frozen=True, kw_only=True, slots=True)
class TaskResult:
    """The scores of a task over its examples; `dropped` have no place in the model and are not
    among them.
    """

    scores: Mapping[str, Estimate]
    examples: int
    dropped: int
    samples: Sequence[Sample]


def score_tasks(
    model: InferenceModel,
    cluster: Cluster,
    tasks: Mapping[str, PreparedTask],
    *,
    seed: int,
    activity: Activity,
) -> dict[str, TaskResult] | None:
    """Ask a model every task and judge its answers; a collective, with the same results on all
    ranks.

    None where a stop was requested of any rank, which is looked up before each batch.
    The speaker is what `speaking` gives for a model under an engine, or `Speaker(lm=model,
    device=device)` for one that is loaded whole.
    """
    results = {}
    for name, asked in tasks.items():
        outputs = _outputs_of_rank(model, cluster, name, asked, seed=seed, activity=activity)
        if outputs is None:
            return None
        activity.begin(f"scores of {name}")
        everything = [output for part in cluster.gather(outputs) for output in part]
        # On one rank: to draw examples again a thousand times takes seconds.
        result = _judged(name, asked, everything) if cluster.world.is_first else None
        results[name] = cluster.gather(result)[0]
    return results


def task_line(results: Mapping[str, TaskResult]) -> dict[str, float | int | bool | None]:
    """The part of an evaluation's line that tasks have."""
    line: dict[str, float | int | bool | None] = {}
    for name, result in results.items():
        for kind, score in result.scores.items():
            line[f"task/{name}/{kind}"] = score.value
            line[f"task_low/{name}/{kind}"] = score.low
            line[f"task_high/{name}/{kind}"] = score.high
        line[f"task_examples/{name}"] = result.examples
        if result.dropped:
            line[f"task_dropped/{name}"] = result.dropped
    return line


def write_samples(folder: Path, step: int, results: Mapping[str, TaskResult]) -> None:
    """Keep the sample outputs of an evaluation as samples/TASK/step-NNNNNN.jsonl in the folder of a
    run.
    """
    for name, result in results.items():
        if result.samples:
            own = folder / SAMPLES / name
            own.mkdir(parents=True, exist_ok=True)
            lines = [_as_json(sample) for sample in result.samples]
            replace_text(own / f"step-{step:06d}.jsonl", "".join(f"{line}\n" for line in lines))


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


@dataclass(frozen=True, kw_only=True, slots=True)
class _Batch:
    """Outputs (question, number of the output) that are written together; idle ones count for
    nothing.
    """

    rows: Sequence[tuple[Question, int]]
    is_idle: bool


def _batches(asked: PreparedTask, world: World) -> Sequence[_Batch]:
    """What a rank asks, in as many batches as each of the others; questions of like lengths
    together, the longest first.
    """
    task = asked.task
    outputs, size = task.outputs, task.batch_rows
    if task.by == "likelihood":
        # A row is then a label, and all labels of a question go together.
        outputs, size = 1, max(1, size // len(asked.labels))
    ordered = sorted(asked.questions, key=lambda q: (-len(q.prompt), q.example.index))
    rows = [(question, number) for question in ordered for number in range(outputs)]
    own = rows[world.rank :: world.size]
    longest = -(-len(rows) // world.size)
    parts = [own[at : at + size] for at in range(0, longest, size)]
    return [_Batch(rows=part or rows[-1:], is_idle=not part) for part in parts]


def _outputs_of_rank(
    model: InferenceModel,
    cluster: Cluster,
    name: str,
    asked: PreparedTask,
    *,
    seed: int,
    activity: Activity,
) -> list[_Output] | None:
    """The outputs of this rank's batches; None on all ranks where one of them is asked to stop."""
    batches = _batches(asked, cluster.world)
    outputs: list[_Output] = []
    for number, batch in enumerate(batches, 1):
        activity.begin(f"task {name}, batch {number} of {len(batches)}")
        if any(cluster.sum_counts([activity.stop_requested()])):
            return None
        if batch.is_idle and not model.in_step:
            continue
        texts = _answers(model, asked, batch.rows, key_of(seed, "task", name))
        if not batch.is_idle:
            outputs += _outputs(
                asked, batch.rows, texts, lambda: activity.begin(f"programs of {name}")
            )
    return outputs


def _answers(
    model: InferenceModel, asked: PreparedTask, rows: Sequence[tuple[Question, int]], key: int
) -> list[str]:
    """What the model answers to each row."""
    if asked.task.by == "likelihood":
        questions = [question for question, _ in rows]
        return [
            asked.labels[int(np.argmax(_normalised(asked, question, values)))]
            for question, values in zip(questions, log_likelihoods(model, questions), strict=True)
        ]
    prompts = [
        Prompt(tokens=question.prompt, key=key_of(key, question.example.index, number))
        for question, number in rows
    ]
    texts = generate(model, asked.tokenizer, asked.task, asked.stops, prompts)
    # A chat's answer has its spaces from the template; those of a text may be code's.
    return [text.strip() for text in texts] if asked.is_chat else texts


def _normalised(asked: PreparedTask, question: Question, values: Sequence[float]) -> list[float]:
    """The log-likelihoods of the labels, divided as the task says."""
    lengths = {
        "none": [1] * len(values),
        "tokens": [len(tokens) for tokens in question.labels],
        "bytes": [len(label.encode()) for label in asked.labels],
    }[asked.task.length_normalise]
    return [value / length for value, length in zip(values, lengths, strict=True)]


def _outputs(
    asked: PreparedTask,
    rows: Sequence[tuple[Question, int]],
    texts: Sequence[str],
    runs_program: Callable[[], None],
) -> Iterator[_Output]:
    """The texts with what they are of; `runs_program` is told before each program, which may take
    its whole time.
    """
    for (question, number), text in zip(rows, texts, strict=True):
        is_passed = False
        if asked.task.passes_at:
            runs_program()
            is_passed = _passes(asked, question, text)
        yield _Output(index=question.example.index, number=number, text=text, passes=is_passed)


def _passes(asked: PreparedTask, question: Question, text: str) -> bool:
    example, task = question.example, asked.task
    program = program_of(text, None if asked.is_chat else example.shown, example.test)
    return passes(program, timeout_s=task.execute_timeout_s, memory_mib=task.execute_memory_mib)


def _judged(name: str, asked: PreparedTask, outputs: Sequence[_Output]) -> TaskResult:
    """The result of a task from the outputs of all ranks."""
    by_example: dict[int, list[_Output]] = {}
    for output in sorted(outputs, key=lambda output: (output.index, output.number)):
        by_example.setdefault(output.index, []).append(output)
    examples = {question.example.index: question.example for question in asked.questions}
    answered = [
        Answered(
            example=examples[index],
            outputs=tuple(output.text for output in own),
            passed=sum(output.passes for output in own),
        )
        for index, own in by_example.items()
    ]
    judged = {
        kind: score_answers(kind, answered, asked.task, asked.labels) for kind in asked.task.scores
    }
    samples = [
        Sample(
            prompt=answered[at].example.shown,
            references=answered[at].example.references,
            outputs=answered[at].outputs,
            scores={k: float(j.values_N[at]) for k, j in judged.items() if j.values_N is not None},
        )
        for at in evenly_spaced(range(len(answered)), asked.task.samples)
    ]
    return TaskResult(
        scores={kind: scored(f"{name}/{kind}", each) for kind, each in judged.items()},
        examples=len(answered),
        dropped=asked.dropped,
        samples=samples,
    )
