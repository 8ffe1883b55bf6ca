"""The knowledge probe: what is planted among the texts, and the questions that belong to it."""

import gzip
import json

import pytest
import torch
import transformers
from support.models import FAMILIES

from bigmix.commands.main import main
from bigmix.commands.probe.facts import WORLDS, most_people, people
from bigmix.commands.probe.plant import NEW_QUESTIONS, PLANTED, QUESTIONS, TEXT
from bigmix.text.tokenizer import load_tokenizer, train_tokenizer


def lines(path):
    content = path.read_bytes()
    text = gzip.decompress(content) if path.suffix == ".gz" else content
    return [json.loads(line) for line in text.decode().splitlines()]


@pytest.fixture
def texts(tmp_path):
    path = tmp_path / "texts.jsonl"
    rows = [{"text": f"Text number {number}."} for number in range(7)]
    path.write_text("".join(json.dumps(row) + "\n" for row in [*rows, {"text": ""}]))
    return path


def make(texts, *words):
    out = texts.parent / "probe"
    assert main(["probe", "make", str(texts), "--output", str(out), *words]) == 0
    return out


@pytest.mark.parametrize("language", ["en", "zh"])
def test_every_fact_is_stated_in_each_document_of_its_person(texts, language):
    out = make(texts, "--people", "5", "--times", "4", "--language", language)
    planted, questions = lines(out / PLANTED), lines(out / QUESTIONS)
    assert len(planted) == 20 and len(questions) == 25
    stop = WORLDS[language].stop
    for person in people(WORLDS[language], 5, 0):
        own = [row["text"] for row in planted if person.name in row["text"]]
        assert len(own) == 4
        for text in own:
            sentences = text.split(stop)[:-1]
            assert len(sentences) == 5
            for value in person.values.values():
                assert sum(sentence.endswith(value) for sentence in sentences) == 1


@pytest.mark.parametrize("language", ["en", "zh"])
def test_a_question_is_the_beginning_of_a_sentence_that_was_planted_and_a_new_one_never_was(
    texts, language
):
    out = make(texts, "--people", "20", "--times", "30", "--language", language)
    planted = "\n".join(row["text"] for row in lines(out / PLANTED))
    between = WORLDS[language].between
    for question in lines(out / QUESTIONS):
        assert f"{question['prompt']}{between}{question['response']}" in planted
    new = lines(out / NEW_QUESTIONS)
    assert not any(question["prompt"] in planted for question in new)
    facts = [(q["attribute"], q["response"]) for q in lines(out / QUESTIONS)]
    assert [(q["attribute"], q["response"]) for q in new] == facts


@pytest.mark.parametrize(("people", "times"), [(1, 1), (2, 2), (5, 20)])
def test_planted_documents_are_spread_evenly_among_all_the_texts(texts, people, times):
    out = make(texts, "--people", str(people), "--times", str(times))
    rows = lines(out / TEXT)
    assert [row["text"] for row in rows if not row.get("planted")] == [
        f"Text number {number}." for number in range(7)
    ]
    assert [row["text"] for row in rows if row.get("planted")] == [
        row["text"] for row in lines(out / PLANTED)
    ]
    for place, row in enumerate(rows):
        if row.get("planted"):
            planted = sum(bool(each.get("planted")) for each in rows[:place])
            assert place - planted == planted * 7 // (people * times)


def test_the_same_seed_gives_the_same_bytes_and_another_one_other_people(texts):
    first = {path.name: path.read_bytes() for path in make(texts, "--people", "9").iterdir()}
    again = {path.name: path.read_bytes() for path in make(texts, "--people", "9").iterdir()}
    assert first == again
    make(texts, "--people", "9", "--seed", "1")
    other = {path.name: path.read_bytes() for path in (texts.parent / "probe").iterdir()}
    assert other[QUESTIONS] != first[QUESTIONS]


@pytest.mark.parametrize("world", WORLDS.values(), ids=WORLDS)
def test_names_and_values_differ(world):
    names = [person.name for person in people(world, most_people(world), 0)]
    assert len(set(names)) == len(names)
    for attribute in world.attributes:
        assert len(set(attribute.values)) == len(attribute.values)
        assert attribute.new not in attribute.planted


def test_rows_without_a_text_are_counted(texts, capsys):
    make(texts)
    assert "records without a text  1, left out" in capsys.readouterr().out


def test_more_people_than_names_are_refused(texts, capsys):
    words = ["probe", "make", str(texts), "--output", str(texts.parent / "out"), "--people", "1M"]
    assert main(words) == 2
    assert "--people is 1,000,000 and there are 10,000 names" in capsys.readouterr().err
    assert not (texts.parent / "out").exists()


def test_what_is_read_is_not_written_over(texts, capsys):
    make(texts)
    made = texts.parent / "probe"
    assert main(["probe", "make", str(made / "text.jsonl.gz"), "--output", str(made)]) == 2
    assert "text.jsonl.gz would be written over" in capsys.readouterr().err


def test_inputs_that_are_no_texts_are_refused(tmp_path, capsys):
    chats = tmp_path / "chats.jsonl"
    chats.write_text('{"prompt": "a", "response": "b"}\n')
    assert main(["probe", "make", str(chats), "--output", str(tmp_path / "out")]) == 2
    assert "prompt" in capsys.readouterr().err


@pytest.fixture
def learned(texts):
    """A probe of three people, and a small model that has read what is planted many times."""
    out = make(texts, "--people", "3", "--times", "12")
    planted = [row["text"] for row in lines(out / PLANTED)]
    folder = texts.parent / "model"
    train_tokenizer(planted, vocab_size=600, kind="bpe", folder=folder)
    tokenizer = load_tokenizer(str(folder))
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 128, "vocab_size": tokenizer.vocab_size}
    config = transformers.AutoConfig.for_model(**(FAMILIES["llama"] | sizes))
    model = transformers.AutoModelForCausalLM.from_config(config)
    rows = [torch.tensor([*ids.tolist(), tokenizer.eos_id]) for ids in tokenizer.encode(planted)]
    ids_RT = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=-100)[:, :128]
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(100):
        model(input_ids=ids_RT.clamp(min=0), labels=ids_RT).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained(folder)
    return out, folder


def recalled(folder, questions):
    """What a plain loop finds: greedy answers to one question after another, cut at the full
    stop.
    """
    model = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    right = []
    for question in questions:
        ids = tokenizer(question["prompt"], return_tensors="pt", add_special_tokens=False).input_ids
        written = model.generate(ids, max_new_tokens=16, do_sample=False, pad_token_id=0)
        answer = tokenizer.decode(written[0, ids.shape[1] :]).partition(".")[0]
        right.append(answer.strip() == question["response"])
    return right


@pytest.mark.slow
def test_recall_is_that_of_a_plain_loop(learned, capsys):
    out, folder = learned
    capsys.readouterr()
    assert main(["probe", "score", str(folder), "--probe", str(out), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)[str(folder)]
    for words, file in (("planted", QUESTIONS), ("new", NEW_QUESTIONS)):
        questions = lines(out / file)
        right = recalled(folder, questions)
        everything = found[words]["everything"]
        assert everything["facts"] == len(right) == 15
        assert everything["value"] == pytest.approx(sum(right) / 15)
        assert everything["low"] <= everything["value"] <= everything["high"]
        for attribute, recall in found[words]["attributes"].items():
            own = [r for r, q in zip(right, questions, strict=True) if q["attribute"] == attribute]
            assert recall["value"] == pytest.approx(sum(own) / len(own))
    assert found["planted"]["everything"]["value"] > 0.3


def test_a_folder_without_a_probe_is_refused(tmp_path, capsys):
    assert main(["probe", "score", str(tmp_path), "--probe", str(tmp_path)]) == 2
    assert "holds no probe" in capsys.readouterr().err
