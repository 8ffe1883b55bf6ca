"""What the ranks of the tests of tasks run: `python -m support.workers.tasks FUNCTION ARGUMENTS
OUTPUT`.
"""

from dataclasses import replace
from pathlib import Path

from support.models import FAMILIES
from support.workers.engines import (
    aim,
    batch_of,
    documents,
    main,
    make_engine,
    take_step,
    whole_weights,
)

from bigmix.cluster.signals import UNWATCHED
from bigmix.evaluation.tasks.examples import open_tasks
from bigmix.evaluation.tasks.inference_model import gathered_for_inference
from bigmix.evaluation.tasks.prompts import ChatFormat, tokenise_tasks
from bigmix.evaluation.tasks.runner import score_tasks, task_line
from bigmix.model.export import export
from bigmix.recipe.task import Task
from bigmix.text.chat_template import open_template
from bigmix.text.tokenizer import load_tokenizer

for config in FAMILIES.values():
    config["vocab_size"] = 400  # that of the tests' tokenizer


def asked_tasks(tokenizer, tasks, positions):
    language = load_tokenizer(tokenizer)
    files = open_tasks({name: Task.model_validate(task) for name, task in tasks.items()})
    return tokenise_tasks(
        files, ChatFormat(tokenizer=language, template=open_template(language, "plain")), positions
    )


def scored(engine, cluster, asked, weights, activity=UNWATCHED):
    with (
        engine.evaluating(),
        gathered_for_inference(engine.module.lm, engine.device, cluster, weights) as speaker,
    ):
        assert speaker.in_step == (weights == "sharded")
        return score_tasks(speaker, cluster, asked, seed=7, activity=activity)


def answers(rank, ranks, cluster, folder, tokenizer, tasks, families, modes):
    """Line and outputs of every task, by family and by how the weights are held; the model is
    exported.
    """
    asked = asked_tasks(tokenizer, tasks, 128)
    found = {}
    for family in families:
        engine = make_engine(family, 1, ranks)
        for weights in modes:
            results = scored(engine, cluster, asked, weights)
            found[f"{family} {weights}"] = {
                "line": task_line(results),
                "outputs": {
                    name: [list(sample.outputs) for sample in result.samples]
                    for name, result in results.items()
                },
            }
        if ranks == 1:
            export(
                engine,
                cluster,
                Path(tokenizer),
                Path(folder) / family,
                shard_bytes=2**30,
                texts={},
                on_activity=lambda what: None,
            )
    return found


def step_after_tasks(rank, ranks, cluster, tokenizer, tasks, modes):
    """The weights after two steps, between which tasks were asked in these ways; and what a request
    to stop gives.
    """
    asked = asked_tasks(tokenizer, tasks, 128)
    engine = make_engine("llama", 1, ranks)
    batch = batch_of(documents(True), rank, ranks, 1)
    take_step(engine, cluster, batch, aim("per_source"), lr=1e-2)
    stopped = None
    for weights in modes:
        scored(engine, cluster, asked, weights)
        # One rank is asked to stop: all of them do.
        stopped = scored(
            engine, cluster, asked, weights, replace(UNWATCHED, stop_requested=lambda: rank == 1)
        )
    take_step(engine, cluster, batch, aim("per_source"), lr=1e-2)
    sums = {name: float(weight.sum()) for name, weight in whole_weights(engine).items()}
    return {"sums": sums, "is_stopped": stopped is None}


if __name__ == "__main__":
    main(globals())
