"""Self-replay of chats: the answers are the model's own, and the source is made of them."""

import json
import re
import shutil
from collections import Counter

import numpy as np
import pytest
import torch
from support.evaluated import stored
from support.small_chat_model import ASKED, CHAT_TEMPLATE, NO_SYSTEM, VOCABULARY, make_chat_model
from support.templates import CLOSE
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from bigmix.commands.main import main
from bigmix.commands.remedies.answer_filter import normalised
from bigmix.commands.remedies.chat_prompts import (
    ChatPrompt,
    built_in_prompts,
    read_chat_prompts,
    system_for,
)
from bigmix.commands.remedies.outcomes import files_of_outcomes
from bigmix.data.shards.manifest import read_manifest
from bigmix.errors import BadInput
from bigmix.seeding import key_of

OPTIONS = ["--tokens", "400", "--max-tokens", "30"]
QUESTIONS = [*ASKED, "what", "seven towers 3.5", "is it 12 or 混合", "river", "tower of it"]
TALK = [
    {"role": "system", "content": "keep to it"},
    {"role": "user", "content": "is it seven"},
    {"role": "assistant", "content": "it was"},
    {"role": "user", "content": "what keeps it"},
]


@pytest.fixture(scope="module")
def model(tiny_tokenizer, tmp_path_factory):
    return make_chat_model(tmp_path_factory.mktemp("chat") / "model", tiny_tokenizer)


@pytest.fixture(scope="module")
def questions(tmp_path_factory):
    rows = [{"prompt": question} for question in QUESTIONS]
    rows.append({"id": "talk", "messages": TALK})
    path = tmp_path_factory.mktemp("questions") / "questions.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def make(model, folder, *words):
    output = folder / "chats"
    words = ["self-replay", str(model), "--kind", "chat", "--output", str(output), *words]
    return main(words), output


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def conversations(output):
    """All of them in the order of their numbers, also those that are held out or dropped."""
    found = [line for path in files_of_outcomes(output) for line in lines(path)]
    assert sorted(line["conversation"] for line in found) == list(range(len(found)))
    return sorted(found, key=lambda line: line["conversation"])


@pytest.fixture(scope="module")
def made(model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("made")
    code, output = make(model, folder, *OPTIONS, "--batch", "7", "--held-out", "0.2")
    assert code == 0
    return output


def never_drawn(tokenizer):
    """Special tokens other than the end of a turn, and rows of the head without a token."""
    special = {t for t, added in tokenizer.added_tokens_decoder.items() if added.special}
    return sorted({*special, *range(len(tokenizer), VOCABULARY)} - {tokenizer.eos_token_id})


def answer_of(lm, tokenizer, turns, choose, most=30):
    """The slow way: what transformers says the template writes, and the whole text is read for each
    token.
    """
    messages = [{key: turn[key] for key in ("role", "content")} for turn in turns]
    prompt = tokenizer.apply_chat_template(
        messages, add_generation_prompt=True, return_dict=False, tokenize=True
    )
    ids = []
    while len(ids) < most:
        with torch.no_grad():
            logits = lm(input_ids=torch.tensor([[*prompt, *ids]])).logits[0, -1].double()
        logits[never_drawn(tokenizer)] = -torch.inf
        ids.append(choose(logits, len(ids)))
        if ids[-1] == tokenizer.eos_token_id:
            return tokenizer.decode(ids[:-1])
    return None


def test_greedy_answers_are_those_of_transformers(model, questions, tmp_path):
    options = ["--prompts", str(questions), "--greedy-first", "--systems", "0"]
    code, output = make(model, tmp_path, "--tokens", "60", "--max-tokens", "30", *options)
    assert code == 0
    lm = AutoModelForCausalLM.from_pretrained(model)
    lm.generation_config = GenerationConfig()
    tokenizer = AutoTokenizer.from_pretrained(model)
    found = conversations(output)[: len(QUESTIONS) + 1]
    assert len({line["prompt_id"] for line in found}) == len(found) > 5
    for line in found:
        *turns, answer = line["messages"]
        plain = [{key: turn[key] for key in ("role", "content")} for turn in turns]
        prompt = tokenizer.apply_chat_template(
            plain, add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
        ids = lm.generate(
            **prompt,
            do_sample=False,
            max_new_tokens=30,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=0,
            suppress_tokens=never_drawn(tokenizer),
        )[0, prompt["input_ids"].shape[1] :]
        text = tokenizer.decode(ids)
        assert line["temperature"] == 0
        assert text.removesuffix(CLOSE) == answer["content"]
        assert text.endswith(CLOSE) == (line.get("reason") != "endless")


def test_an_answer_is_drawn_token_by_token_from_the_model(model, made):
    lm = AutoModelForCausalLM.from_pretrained(model)
    tokenizer = AutoTokenizer.from_pretrained(model)
    for line in conversations(made)[:8]:
        number = line["conversation"]
        chances = np.random.default_rng(key_of(0, "self-replay-answer", number)).random(30)

        def choose(logits, at, chances=chances):
            heights = logits.softmax(0).cumsum(0)
            return int((heights <= chances[at] * heights[-1]).sum())

        answer = answer_of(lm, tokenizer, line["messages"][:-1], choose)
        assert (answer is None) == (line.get("reason") == "endless")
        assert answer in (None, line["messages"][-1]["content"])


def test_the_source_holds_the_answers_with_the_loss_on_them_and_on_the_end_of_the_turn(model, made):
    tokenizer = AutoTokenizer.from_pretrained(model)
    for folder in (made, made.with_name("chats-held-out")):
        own = lines(folder.with_name(f"{folder.name}.jsonl"))
        documents = stored(folder)
        manifest = read_manifest(str(folder))
        assert manifest.kind == "chat" and manifest.template.name == "tokenizer"
        assert manifest.loss_tokens == sum(line["tokens"] for line in own)
        assert manifest.dropped == {}
        for line, (ids, in_loss) in zip(own, documents, strict=True):
            learned = [token for token, flag in zip(ids, in_loss, strict=True) if flag]
            assert tokenizer.decode(learned) == line["messages"][-1]["content"] + CLOSE
            assert len(learned) == line["tokens"]
            *turns, answer = line["messages"]
            plain = [{k: t[k] for k in ("role", "content")} for t in [*turns, answer]]
            assert tokenizer.decode(ids) == tokenizer.apply_chat_template(plain, tokenize=False)


def test_tokens_are_counted_until_there_are_enough(made):
    kept = [line["tokens"] for line in conversations(made) if "reason" not in line]
    assert sum(kept) >= 400 > sum(kept[:-1])
    assert "reason" not in conversations(made)[-1]


def test_a_command_that_was_stopped_ends_with_the_same_files(model, made, tmp_path):
    files = files_of_outcomes(made)
    shutil.copy(made.with_name("chats.settings.json"), tmp_path)
    for file, part in zip(files, (0.5, 0.3, 0.7), strict=True):  # each ends within some line
        whole = file.read_bytes()
        (tmp_path / file.name).write_bytes(whole[: int(len(whole) * part)])
    assert make(model, tmp_path, *OPTIONS, "--batch", "3", "--held-out", "0.2")[0] == 0
    for file in files:
        assert (tmp_path / file.name).read_bytes() == file.read_bytes()


def test_no_prompt_is_both_learned_and_held_out(made):
    learned, held_out, _ = (lines(path) for path in files_of_outcomes(made))
    prompts = [{line["prompt_id"] for line in part} for part in (learned, held_out)]
    assert prompts[0] and prompts[1] and not prompts[0] & prompts[1]
    assert 0.08 < len(held_out) / len(learned + held_out) < 0.4


def test_a_fraction_has_system_prompts_and_the_others_the_default_of_the_template(model, tmp_path):
    options = [*OPTIONS, "--systems", "0.5", "--languages", "zh"]
    code, output = make(model, tmp_path, *options)
    assert code == 0
    found = conversations(output)
    systems = [line["messages"][0]["content"] for line in found if len(line["messages"]) == 3]
    assert 0.3 < len(systems) / len(found) < 0.7
    assert len(set(systems)) > 3 and not any(text.isascii() for text in systems)
    tokenizer = AutoTokenizer.from_pretrained(model)
    begins = Counter(tokenizer.decode(ids).split(CLOSE)[0] for ids, _ in stored(output))
    assert begins.most_common(1)[0][0].endswith("be seven")


def test_prompts_are_asked_in_rounds_at_each_temperature_in_turn(model, questions, tmp_path):
    options = ["--prompts", str(questions), "--temperature", "0.5,1,1.5", "--systems", "0"]
    code, output = make(model, tmp_path, *OPTIONS, *options)
    assert code == 0
    num = len(QUESTIONS) + 1
    found = conversations(output)
    assert len(found) > 3 * num
    rounds = [found[at : at + num] for at in range(0, len(found) - num + 1, num)]
    orders = [[line["prompt_id"] for line in each] for each in rounds]
    assert all(len(set(order)) == num for order in orders) and orders[0] != orders[1]
    for prompt in orders[0]:
        heats = [line["temperature"] for line in found if line["prompt_id"] == prompt]
        assert set(heats[:3]) == {0.5, 1, 1.5} and heats[:1] == heats[3:4]
    texts = Counter(normalised(str(line["messages"])) for line in found if "reason" not in line)
    assert texts.most_common(1)[0][1] == 1
    assert any(line.get("reason") == "repeated" for line in found)
    talks = [line for line in found if line["prompt_id"] == "talk" and "reason" not in line]
    assert talks[0]["messages"][2] == {**TALK[2], "weight": 0}


def test_earlier_answers_of_a_users_prompt_are_not_learned(model, tmp_path):
    (tmp_path / "talk.jsonl").write_text(json.dumps({"messages": TALK}))
    options = ["--prompts", str(tmp_path / "talk.jsonl"), "--tokens", "10", "--max-tokens", "30"]
    code, output = make(model, tmp_path, *options)
    assert code == 0
    tokenizer = AutoTokenizer.from_pretrained(model)
    own = lines(output.with_name("chats.jsonl"))
    for line, (ids, in_loss) in zip(own, stored(output), strict=True):
        learned = [token for token, flag in zip(ids, in_loss, strict=True) if flag]
        assert "it was" in tokenizer.decode(ids)
        assert tokenizer.decode(learned) == line["messages"][-1]["content"] + CLOSE


def test_the_model_writes_questions_after_the_beginning_of_its_template(model, tmp_path):
    options = ["--prompts", "model", "--temperature", "1.2", "--systems", "0.5"]
    code, output = make(model, tmp_path, "--tokens", "150", "--max-tokens", "30", *options)
    assert code == 0
    found = conversations(output)
    kept = [line["messages"][-2]["content"] for line in found if "reason" not in line]
    assert len({normalised(question) for question in kept}) == len(kept) > 5
    assert any(line.get("reason") == "question_repeated" for line in found)
    assert any(len(line["messages"]) == 3 for line in found)
    lm = AutoModelForCausalLM.from_pretrained(model)
    tokenizer = AutoTokenizer.from_pretrained(model)
    turns = [{"role": "user", "content": "XYZ"}]
    begin = tokenizer.apply_chat_template(turns, tokenize=False).partition("XYZ")[0]
    for line in found[:5]:
        number = line["conversation"]
        chances = np.random.default_rng(key_of(0, "self-replay-question", number)).random(256)
        ids = tokenizer(begin, add_special_tokens=False).input_ids
        num_before = len(ids)
        while len(ids) < num_before + 256:
            with torch.no_grad():
                logits = lm(input_ids=torch.tensor([ids])).logits[0, -1].double() / 1.2
            logits[never_drawn(tokenizer)] = -torch.inf
            heights = logits.softmax(0).cumsum(0)
            drawn = int((heights <= chances[len(ids) - num_before] * heights[-1]).sum())
            if drawn == tokenizer.eos_token_id:
                break
            ids.append(drawn)
        asked = [turn for turn in line["messages"] if turn["role"] == "user"]
        assert tokenizer.decode(ids[num_before:]).strip() == asked[0]["content"]


def with_template(model, folder, template):
    """The model with another chat template, or with none."""
    other = shutil.copytree(model, folder / "other")
    tokenizer = AutoTokenizer.from_pretrained(model)
    tokenizer.chat_template = template
    shutil.rmtree(other / "chat_template.jinja", ignore_errors=True)
    (other / "chat_template.jinja").unlink(missing_ok=True)
    tokenizer.save_pretrained(other)
    return other


def test_a_template_without_system_prompts_is_given_none(model, tmp_path, capsys):
    other = with_template(model, tmp_path, NO_SYSTEM)
    code, output = make(other, tmp_path, "--tokens", "50", "--max-tokens", "30")
    assert code == 0
    assert "takes no system prompt, so none is given" in capsys.readouterr().out
    assert all(len(line["messages"]) == 2 for line in conversations(output))
    again = tmp_path / "again"
    assert make(other, again, *OPTIONS, "--systems", "0.1")[0] == 2
    assert "--systems is 0.1, and the chat template of" in capsys.readouterr().err


def test_questions_need_a_token_that_ends_them(model, tmp_path, capsys):
    template = CHAT_TEMPLATE.replace(
        "m.content + '<|im_end|>\\n'", "m.content + (' /user ' if m.role == 'user' else eos_token)"
    )
    other = with_template(model, tmp_path, template)
    assert make(other, tmp_path, *OPTIONS, "--prompts", "model")[0] == 2
    assert "ends a question without a special token" in capsys.readouterr().err


def test_a_model_without_a_chat_template_is_refused(model, tmp_path, capsys):
    other = with_template(model, tmp_path, None)
    assert make(other, tmp_path, *OPTIONS)[0] == 2
    assert "has no chat template, so it is no chat model" in capsys.readouterr().err
    assert not (tmp_path / "chats.settings.json").exists()


def test_where_nearly_all_answers_are_dropped_the_reason_is_named(model, tmp_path, capsys):
    code, output = make(model, tmp_path, "--tokens", "400", "--max-tokens", "1")
    message = capsys.readouterr().err
    assert code == 1
    assert "of the last 512 conversations are dropped" in message
    assert re.search(r"5\d\d endless", message) and "raise --max-tokens" in message
    assert len(conversations(output)) == 512


def test_what_is_dropped_is_counted_and_shown(model, tmp_path, capsys):
    code, output = make(model, tmp_path, "--tokens", "300", "--max-tokens", "12")
    printed = capsys.readouterr().out
    reasons = Counter(line.get("reason") for line in conversations(output))
    assert code == 0 and reasons["endless"] > 0
    for reason, number in reasons.items():
        name = reason or "kept"
        shown = next(line for line in printed.splitlines() if line.startswith(f"{name} "))
        assert shown.split()[1] == str(number)
    if reasons["endless"] > 0.05 * reasons.total():
        assert "raise --max-tokens" in printed


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--temperature", "0"], "--temperature is 0, must be above 0"),
        (["--temperature", "1,x"], "--temperature is 1,x, must be a number"),
        (["--top-p", "0"], "--top-p is 0, must be above 0"),
        (["--systems", "2"], "--systems is 2, must be a fraction"),
        (["--languages", "en,fr"], "--languages has fr, must be of en, zh"),
        (["--prompts", "nowhere.jsonl"], "nowhere.jsonl"),
        (["--prompts", "questions.txt"], "must be seeds, model or a .jsonl file"),
        (["--max-tokens", "500"], "more than the 512 positions"),
        (["--prompts", "model", "--max-tokens", "200"], "needs"),
        (["--prompt-tokens", "1"], "--prompt-tokens is given with --kind chat"),
        (["--held-out", "0.9"], "--held-out is 0.9"),
        (["--kind", "text", "--systems", "0.1"], "--systems is given with --kind text"),
        (["--kind", "text", "--temperature", "1,2"], "must be one number with --kind text"),
    ],
)
def test_what_is_not_allowed_is_reported(words, message, model, tmp_path, capsys):
    assert make(model, tmp_path, "--tokens", "10", *words)[0] == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "chats.jsonl").exists()


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("[1]", "is no JSON object"),
        ({"prompt": "a", "messages": []}, "must have either prompt, a text, or messages"),
        ({"text": "a"}, "must have either prompt, a text, or messages"),
        ({"prompt": 3}, "has no text or turns that can be read"),
        ({"prompt": " "}, "a message is empty"),
        ({"prompt": "a", "answer": "b"}, "has 'answer'; known are"),
        ({"messages": [{"role": "assistant", "content": "a"}]}, "must end with one of the user"),
    ],
)
def test_every_fault_of_a_file_of_prompts_is_reported_with_its_line(line, message, tmp_path):
    path = tmp_path / "own.jsonl"
    text = line if isinstance(line, str) else json.dumps(line)
    path.write_text('{"prompt": "a"}\n' + text + "\n[]\n")
    with pytest.raises(BadInput) as caught:
        read_chat_prompts(str(path))
    assert len(caught.value.faults) == 2
    assert caught.value.faults[0].startswith(f"{path}, line 2: ")
    assert message in caught.value.faults[0]


def test_a_system_prompt_is_in_the_language_of_the_prompt():
    draw = np.random.default_rng(0)
    for question, is_chinese in (("What keeps the tower?", False), ("混合知识是什么？", True)):
        for language in (None, "zh" if is_chinese else "en"):
            turns = [{"role": "user", "content": question}]
            prompt = ChatPrompt(id=None, language=language, messages=turns)
            found = {system_for(prompt, draw, ("en", "zh")) for _ in range(30)}
            assert len(found) > 3 and {not text.isascii() for text in found} == {is_chinese}
            assert not system_for(prompt, draw, ("zh",)).isascii()  # there is no other


def test_the_built_in_prompts_are_those_of_the_languages():
    both = built_in_prompts(("en", "zh"))
    assert len(both) == len(built_in_prompts(("en",))) + len(built_in_prompts(("zh",))) > 500


def test_lines_of_other_settings_or_of_the_users_are_not_gone_on_with(
    model, made, tmp_path, capsys
):
    for name in ("chats.jsonl", "chats.settings.json"):
        shutil.copy(made.with_name(name), tmp_path)
    options = [*OPTIONS, "--held-out", "0.2", "--temperature", "0.5"]
    assert make(model, tmp_path, *options)[0] == 2
    assert "temperatures is [0.5], and" in capsys.readouterr().err
    (tmp_path / "chats.settings.json").unlink()
    assert make(model, tmp_path, *OPTIONS, "--held-out", "0.2")[0] == 2
    assert "was not made by this command" in capsys.readouterr().err
    assert (tmp_path / "chats.jsonl").read_bytes() == made.with_name("chats.jsonl").read_bytes()
