"""Answers are the same on any number of ranks, under ZeRO-3, and in a plain loop on the export."""

import json

import pytest
import torch
import transformers
from support.ranks import run_on_ranks

from bigmix.cluster.collectives import Cluster
from bigmix.cluster.signals import UNWATCHED
from bigmix.cluster.world import World
from bigmix.evaluation.tasks.examples import open_tasks
from bigmix.evaluation.tasks.inference_model import gathered_for_inference
from bigmix.evaluation.tasks.prompts import ChatFormat, tokenise_tasks
from bigmix.evaluation.tasks.runner import score_tasks
from bigmix.recipe.task import Task
from bigmix.text.chat_template import open_template
from bigmix.text.tokenizer import load_tokenizer

QUESTIONS = [
    "the river",
    "bright tower under the river",
    "seven learns",
    "it keeps 12",
    "混合 a 知识",
    "café in it",
    "was of",
]
LABELS = ("the tower", "river", "bright and seven", "café")
NEW_TOKENS = 6


def plain_prompt(question):
    return f"User: {question}\n\nAssistant:"


@pytest.fixture(scope="module")
def tasks(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tasks")
    rows = [
        {"prompt": question, "label": LABELS[at % len(LABELS)]}
        for at, question in enumerate(QUESTIONS)
    ]
    all_rows, few = folder / "all.jsonl", folder / "few.jsonl"
    all_rows.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    few.write_text("".join(json.dumps(row) + "\n" for row in rows[:2]))
    common = {"path": str(all_rows), "batch_rows": 3, "max_new_tokens": NEW_TOKENS}
    return {
        "greedy": common | {"scores": ["exact_match", "chrf"]},
        "text": common | {"scores": ["token_f1"], "format": "text"},
        "few": common | {"scores": ["exact_match"], "path": str(few)},
        "drawn": common | {"scores": ["token_f1"], "temperature": 1.3, "top_p": 0.9, "outputs": 2},
        "labels": (
            common | {"scores": ["accuracy", "macro_f1"], "by": "likelihood", "batch_rows": 9}
        ),
    }


def arguments(tasks, tiny_tokenizer, folder, **more):
    return {"tokenizer": str(tiny_tokenizer), "tasks": tasks, "folder": str(folder)} | more


@pytest.fixture(scope="module")
def alone(tasks, tiny_tokenizer, tmp_path_factory):
    """What one rank answers with models of four families, and where they are exported."""
    folder = tmp_path_factory.mktemp("alone")
    families = ["llama", "qwen", "gpt2", "gemma"]
    given = arguments(tasks, tiny_tokenizer, folder, families=families, modes=["whole"])
    (found,) = run_on_ranks("answers", 1, folder, given, module="support.workers.tasks")
    return found, folder


@pytest.fixture(scope="module", params=["llama", "qwen", "gpt2", "gemma"])
def exported(request, alone, tiny_tokenizer):
    """A model that was exported, with what the engine answered."""
    found, folder = alone
    attention = "eager" if request.param == "gemma" else "sdpa"
    model = transformers.AutoModelForCausalLM.from_pretrained(
        folder / request.param, attn_implementation=attention
    ).eval()
    return model, load_tokenizer(str(tiny_tokenizer)), found[f"{request.param} whole"]["outputs"]


def plain_greedy(model, tokenizer, prompt):
    """What transformers writes behind one prompt."""
    (ids,) = tokenizer.encode([prompt])
    with torch.no_grad():
        written = model.generate(
            torch.tensor([ids.tolist()]),
            max_new_tokens=NEW_TOKENS,
            do_sample=False,
            eos_token_id=tokenizer.eos_id,
            pad_token_id=tokenizer.eos_id,
        )
    return tokenizer.decode([t for t in written[0, len(ids) :] if t not in tokenizer.special_ids])


def test_greedy_outputs_are_those_of_the_export_one_at_a_time(exported):
    model, tokenizer, outputs = exported
    for question, (output,) in zip(QUESTIONS, outputs["greedy"], strict=True):
        assert output == plain_greedy(model, tokenizer, plain_prompt(question)).strip()
    for question, (output,) in zip(QUESTIONS, outputs["text"], strict=True):
        assert output == plain_greedy(model, tokenizer, question)


def test_the_likeliest_label_is_that_of_a_plain_loop(exported):
    model, tokenizer, outputs = exported
    for question, (chosen,) in zip(QUESTIONS, outputs["labels"], strict=True):
        values = {}
        for label in LABELS:
            prompt, whole = (
                ids.tolist()
                for ids in tokenizer.encode(
                    [plain_prompt(question), f"{plain_prompt(question)} {label}"]
                )
            )
            assert whole[: len(prompt)] == prompt
            ids = torch.tensor([[*whole, tokenizer.eos_id]])
            with torch.no_grad():
                logs_TV = model(ids).logits[0].log_softmax(dim=-1)
            own = range(len(prompt), ids.shape[1])
            values[label] = sum(float(logs_TV[at - 1, ids[0, at]]) for at in own)
        assert chosen == max(values, key=values.get)


def test_an_exported_model_in_a_plain_process_answers_the_same(exported, tasks):
    model, tokenizer, outputs = exported
    files = open_tasks({name: Task.model_validate(task) for name, task in tasks.items()})
    language = ChatFormat(tokenizer=tokenizer, template=open_template(tokenizer, "plain"))
    alone = Cluster(World(rank=0, local_rank=0, size=1, local_size=1))
    with gathered_for_inference(model, torch.device("cpu"), alone) as speaker:
        results = score_tasks(
            speaker, alone, tokenise_tasks(files, language, 128), seed=7, activity=UNWATCHED
        )
    for name, result in results.items():
        assert [list(sample.outputs) for sample in result.samples] == outputs[name]


@pytest.mark.parametrize("ranks", [2, pytest.param(3, marks=pytest.mark.slow)])
def test_answers_and_scores_are_the_same_on_any_number_of_ranks_and_in_any_batch(
    ranks, alone, tasks, tiny_tokenizer, tmp_path
):
    others = {name: task | {"batch_rows": 2} for name, task in tasks.items()}
    given = arguments(
        others, tiny_tokenizer, tmp_path, families=["llama"], modes=["whole", "sharded"]
    )
    expected = alone[0]["llama whole"]
    assert len({tuple(pair) for pair in expected["outputs"]["drawn"]}) == len(QUESTIONS)
    assert all(one != other for one, other in expected["outputs"]["drawn"])
    for found in run_on_ranks("answers", ranks, tmp_path, given, module="support.workers.tasks"):
        assert found == {"llama whole": expected, "llama sharded": expected}


@pytest.mark.slow
def test_training_goes_on_after_tasks_as_without(tasks, tiny_tokenizer, tmp_path):
    few = {name: tasks[name] for name in ("few", "labels")}
    results = {}
    for modes in ([], ["whole", "sharded"]):
        given = {"tokenizer": str(tiny_tokenizer), "tasks": few, "modes": modes}
        first, second = run_on_ranks(
            "step_after_tasks", 2, tmp_path, given, module="support.workers.tasks"
        )
        assert first["is_stopped"] and second["is_stopped"]
        results[bool(modes)] = first["sums"]
    assert results[True] == results[False]
