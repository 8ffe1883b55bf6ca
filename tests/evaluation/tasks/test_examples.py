"""The files of tasks: what their records mean, how they are tokenised, and which are refused."""

import gzip
import json

import pytest
import yaml
from support.recipes import GOOD
from support.templates import CHATML, GENERATION_WITH_END, LAST_THINKS, TALK

from bigmix.errors import BadInput
from bigmix.evaluation.tasks.examples import open_tasks
from bigmix.evaluation.tasks.prompts import ChatFormat, tokenise_tasks
from bigmix.recipe import load_recipe
from bigmix.recipe.task import Task
from bigmix.text.chat_template import encode_chat, open_template
from bigmix.text.formats import Conversation
from bigmix.text.tokenizer import load_tokenizer


def written(folder, rows, name="task.jsonl"):
    path = folder / name
    text = "".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows)
    path.write_bytes(gzip.compress(text.encode()) if name.endswith(".gz") else text.encode())
    return str(path)


def opened(folder, rows, **settings):
    path = written(folder, rows, settings.pop("name", "task.jsonl"))
    settings = {"scores": ["exact_match"]} | settings
    return open_tasks({"t": Task(path=path, **settings)})["t"]


def faults(folder, rows, **settings):
    with pytest.raises(BadInput) as caught:
        opened(folder, rows, **settings)
    return caught.value.faults


def test_prompts_and_answers_come_in_the_usual_forms(tmp_path):
    file = opened(
        tmp_path,
        [
            {"prompt": "a", "response": "b"},
            {"prompt": "a", "label": 3},
            {"prompt": "a", "label": True},
            {"prompt": "q", "context": "c", "references": ["x", "y"]},
            {"prompt": "q", "references": {"text": ["x"], "start": [1]}},
            {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]},
            {"messages": [{"from": "human", "value": "a"}], "response": "b"},
        ],
        name="task.jsonl.gz",
    )
    assert [e.references for e in file.examples] == [
        ("b",),
        ("3",),
        ("true",),
        ("x", "y"),
        ("x",),
        ("b",),
        ("b",),
    ]
    assert [e.shown for e in file.examples] == ["a", "a", "a", "c\n\nq", "q", "a", "a"]


def test_columns_name_the_parts_and_examples_are_spread_evenly(tmp_path):
    rows = [{"text": f"t{at}", "intent": f"l{at % 3}"} for at in range(10)]
    columns = {"prompt": "text", "label": "intent"}
    file = opened(tmp_path, rows, columns=columns, examples=4, scores=["accuracy"])
    assert [example.index for example in file.examples] == [0, 2, 5, 7]
    assert file.labels == ("l0", "l1", "l2")


@pytest.mark.parametrize(
    ("rows", "settings", "message"),
    [
        ([], {}, "holds no example"),
        (
            [{"prompt": "a", "response": "b"}, {"question": "a"}],
            {},
            "line 2: has no prompt and no messages; its columns are question",
        ),
        (
            [{"prompt": "a"}],
            {},
            "line 1: has no answer (one of references, label, response); its columns are prompt",
        ),
        ([{"prompt": "a", "response": "b"}, "", "no json"], {}, "line 3: is no JSON object"),
        ([{"prompt": " ", "response": "b"}], {}, "line 1: its prompt cannot be read or is empty"),
        (
            [{"prompt": "a", "response": "none"}],
            {"scores": ["numeric_match"]},
            "line 1: its answer has no number",
        ),
        (
            [{"prompt": "a", "label": "Cash."}],
            {"scores": ["accuracy"], "labels": ["cash", "card"]},
            "line 1: label 'Cash.' is none of labels; did you mean 'cash'?",
        ),
        (
            [{"prompt": "a", "label": "x"}],
            {"scores": ["macro_f1"], "by": "likelihood"},
            "labels is x; a choice needs two or more",
        ),
        (
            [{"prompt": "a", "label": "us"}, {"prompt": "a", "label": "US"}],
            {"scores": ["accuracy"]},
            "labels 'us' and 'US' differ in case or a full stop alone",
        ),
        (
            [{"prompt": "a", "label": "x"}, {"prompt": "a", "label": "y"}],
            {"scores": ["accuracy"], "labels": ["x", "y", ""]},
            "a label is empty",
        ),
        (
            [{"prompt": "a", "references": ["x", "z"]}],
            {"scores": ["accuracy"], "labels": ["x", "y"]},
            "label 'z' is none of labels",
        ),
        (
            [{"prompt": "a", "response": "b"}],
            {"scores": ["pass@1"], "execute": True},
            "line 1: has no test",
        ),
        ([{"prompt": "a", "response": "\ud800"}], {}, "line 1: holds half of a surrogate pair"),
        (
            [{"messages": "a", "response": "b"}],
            {},
            "line 1: its messages cannot be read or is empty",
        ),
    ],
)
def test_what_is_wrong_is_reported_with_its_line(tmp_path, rows, settings, message):
    (fault,) = faults(tmp_path, rows, **settings)
    assert fault.startswith("tasks.t: ") and message in fault


def test_many_faults_are_counted_and_those_of_all_tasks_reported(tmp_path):
    path = written(tmp_path, [{"prompt": "a"}] * 9)
    tasks = {n: Task(path=path, scores=["exact_match"]) for n in ("one", "two")}
    with pytest.raises(BadInput) as caught:
        open_tasks(tasks | {"gone": Task(path="gone.jsonl", scores=["token_f1"])})
    assert len(caught.value.faults) == 2 * 6 + 1
    assert "4 more faults like these" in caught.value.faults[5]
    assert "tasks.gone: input gone.jsonl is no file" in caught.value.faults[-1]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"scores": ["bleurt"]}, "'bleurt', which is no score; known are: exact_match"),
        ({"scores": ["pass@1"]}, "runs code that the model writes, and execute is false"),
        (
            {"scores": ["pass@5"], "execute": True, "outputs": 2, "temperature": 1.0},
            "outputs is 2, pass@5 needs 5",
        ),
        ({"scores": ["accuracy"], "outputs": 2}, "outputs is 2 and temperature 0"),
        (
            {"scores": ["bleu", "accuracy"], "by": "likelihood"},
            "scores has bleu, and by: likelihood",
        ),
        (
            {"scores": ["bleu"], "columns": {"promt": "x"}},
            "columns names promt; allowed are prompt",
        ),
        ({"scores": ["bleu", "bleu"]}, "name each once"),
        (
            {"scores": ["bleu"], "batchrows": 3},
            "tasks.t.batchrows is not a setting; did you mean batch_rows?",
        ),
    ],
)
def test_settings_that_do_not_fit_are_refused_with_the_recipe(tmp_path, settings, message):
    path = tmp_path / "recipe.yaml"
    task = yaml.safe_dump({"tasks": {"t": {"path": "t.jsonl"} | settings}})
    path.write_text(GOOD + task)
    with pytest.raises(BadInput, match=r"recipe.yaml:\d+: ") as caught:
        load_recipe(str(path))
    assert message in str(caught.value)


def prepared(file, tokenizer, template, positions=None):
    return tokenise_tasks(
        {"t": file}, ChatFormat(tokenizer=tokenizer, template=template), positions
    )["t"]


@pytest.mark.parametrize("source", [None, CHATML, GENERATION_WITH_END, LAST_THINKS])
def test_a_prompt_has_the_tokens_that_it_has_in_training(
    source, tmp_path, tiny_tokenizer, with_template
):
    tokenizer = load_tokenizer(str(tiny_tokenizer)) if source is None else with_template(source)
    template = open_template(tokenizer, "plain" if source is None else "tokenizer")
    file = opened(tmp_path, [{"messages": TALK.messages}])
    (question,) = prepared(file, tokenizer, template).questions
    trained = encode_chat(tokenizer, template, Conversation(messages=TALK.messages, tools=None))
    size = len(question.prompt)
    assert question.prompt == tuple(trained.ids[:size].tolist())
    # All that is left is the last answer, and the first of it is learned.
    assert trained.loss_mask[size] and not trained.loss_mask[size - 1]
    learned = trained.ids[size:][trained.loss_mask[size:]]
    assert TALK.messages[-1]["content"] in tokenizer.decode(learned)


def test_labels_are_the_tokens_that_training_learns_of_them(tmp_path, tiny_tokenizer):
    tokenizer = load_tokenizer(str(tiny_tokenizer))
    template = open_template(tokenizer, "plain")
    labels = ["the river", "the", "混合"]
    rows = [{"prompt": "Which?", "label": label} for label in labels]
    task = {"scores": ["accuracy"], "by": "likelihood"}
    for question in prepared(opened(tmp_path, rows, **task), tokenizer, template).questions:
        for label, tokens in zip(labels, question.labels, strict=True):
            assert tokenizer.decode(tokens) == f" {label}{tokenizer.eos_token}"
    text = prepared(opened(tmp_path, rows, **task, separator="\n"), tokenizer, None).questions[0]
    assert [tokenizer.decode(tokens) for tokens in text.labels] == [
        f"\n{label}" for label in labels
    ]


def test_labels_that_are_cut_from_their_first_letter_follow_an_end(tmp_path, tiny_tokenizer):
    """Where the prompt melts into the labels, or leaves them nothing that they are predicted
    from.
    """
    tokenizer = load_tokenizer(str(tiny_tokenizer))
    rows = [{"prompt": "h", "label": label} for label in ("e river", "e tower")]
    task = {"scores": ["accuracy"], "by": "likelihood", "separator": ""}
    assert tokenizer.bos_id is None
    for question in prepared(opened(tmp_path, rows, **task), tokenizer, None).questions:
        assert question.prompt == (tokenizer.eos_id,)
        assert [tokenizer.decode(ids) for ids in question.labels] == ["he river", "he tower"]


def test_prompts_that_do_not_fit_are_refused_or_dropped_and_counted(tmp_path, tiny_tokenizer):
    tokenizer = load_tokenizer(str(tiny_tokenizer))
    rows = [{"prompt": "the " * count, "response": "x"} for count in (2, 50, 3)]
    file = opened(tmp_path, rows, max_new_tokens=10)
    with pytest.raises(BadInput, match="tasks.t: 1 of 3 prompts do not fit the 40 positions"):
        prepared(file, tokenizer, None, 40)
    file = opened(tmp_path, rows, max_new_tokens=10, long_prompts="drop")
    found = prepared(file, tokenizer, None, 40)
    assert found.num_dropped == 1 and [q.example.index for q in found.questions] == [0, 2]
