"""Self-replay: samples are what the model has learned, whatever the batches and interruptions."""

import json
import shutil

import numpy as np
import pytest
import torch
import transformers
from support.models import FAMILIES
from support.small_chat_model import make_chat_model

from bigmix.commands.main import main
from bigmix.commands.remedies.generator import next_ids, probabilities
from bigmix.data.shards.manifest import read_manifest
from bigmix.seeding import key_of
from bigmix.text.tokenizer import load_tokenizer

OPTIONS = ["--tokens", "300", "--max-tokens", "20"]


@pytest.fixture(scope="module")
def model(tiny_tokenizer, tmp_path_factory):
    """The folder of a random model that ends documents early, with its tokenizer."""
    folder = tmp_path_factory.mktemp("model") / "tiny"
    torch.manual_seed(0)
    tokenizer = load_tokenizer(str(tiny_tokenizer))
    settings = FAMILIES["llama"] | {
        "vocab_size": tokenizer.vocab_size + 3,
        "max_position_embeddings": 32,
    }
    config = transformers.AutoConfig.for_model(
        settings.pop("model_type"), **settings, initializer_range=0.3, eos_token_id=tokenizer.eos_id
    )
    lm = transformers.AutoModelForCausalLM.from_config(config)
    with torch.no_grad():  # so that some documents end before they begin
        start = torch.tensor([[tokenizer.eos_id]])
        lm.lm_head.weight[tokenizer.eos_id] = (
            0.19 * lm.model(input_ids=start).last_hidden_state[0, 0]
        )
    lm.generation_config.repetition_penalty = (
        5.0  # a model's own settings do not change what it has learned
    )
    lm.save_pretrained(folder)
    tokenizer.save(folder)
    return folder


def make(model, folder, *words):
    output = folder / "self"
    code = main(["self-replay", str(model), "--output", str(output), *words])
    return code, output


def documents(output):
    return [json.loads(line) for line in output.with_name("self.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def made(model, tmp_path_factory):
    code, output = make(model, tmp_path_factory.mktemp("made"), *OPTIONS, "--batch", "8")
    assert code == 0
    return output


def test_a_document_is_drawn_token_by_token_from_the_model(model, made):
    """The slow way: one document, no cache, probabilities laid end to end from the first id on."""
    lm = transformers.AutoModelForCausalLM.from_pretrained(model).eval()
    tokenizer = load_tokenizer(str(model))
    for document in documents(made)[:6]:
        chances = np.random.default_rng(key_of(0, "self-replay", document["document"])).random(20)
        ids = [tokenizer.eos_id]
        for chance in chances:
            with torch.no_grad():
                logits = lm(input_ids=torch.tensor([ids])).logits[0, -1].double()
            logits[tokenizer.vocab_size :] = -torch.inf
            logits[sorted(tokenizer.special_ids - {tokenizer.eos_id})] = -torch.inf
            heights = logits.softmax(0).cumsum(0)
            ids.append(int((heights <= chance * heights[-1]).sum()))
            if ids[-1] == tokenizer.eos_id:
                break
        own = ids[1:-1] if ids[-1] == tokenizer.eos_id else ids[1:]
        assert document["text"] == tokenizer.decode(own)
        assert (document["tokens"], document["is_cut"]) == (len(own), ids[-1] != tokenizer.eos_id)


@pytest.mark.parametrize("top_p", [1.0, 0.5])
def test_tokens_come_as_often_as_they_are_probable(top_p):
    draws = 20_000
    torch.manual_seed(0)
    logits = torch.randn(50) * 2
    barred = torch.zeros(50, dtype=torch.bool)
    barred[::7] = True
    expected = (logits.double().masked_fill(barred, -torch.inf) / 0.8).softmax(0)
    if top_p < 1:
        kept, mass = [], 0.0
        for index in expected.argsort(descending=True).tolist():
            if mass >= top_p:
                break
            kept.append(index)
            mass += float(expected[index])
        expected = torch.where(torch.isin(torch.arange(50), torch.tensor(kept)), expected, 0)
        expected /= expected.sum()
    chances = (torch.arange(draws).double() + 0.5) / draws
    heats = torch.full([draws], 0.8, dtype=torch.float64)
    drawn = next_ids(logits.expand(draws, 50), barred, heats, top_p, chances)
    found = torch.bincount(drawn, minlength=50) / draws
    assert float((found - expected).abs().max()) < 2 / draws
    assert not (found[expected == 0] > 0).any()


def test_top_p_keeps_the_tokens_that_transformers_keeps_unless_some_are_equally_probable():
    theirs = transformers.TopPLogitsWarper(0.5)

    def kept_by_both(logits):
        ours = probabilities(logits, torch.ones(len(logits)), 0.5) > 0
        return ours, theirs(None, logits.double()) > -torch.inf

    torch.manual_seed(0)
    ours, others = kept_by_both(torch.randn(200, 64))
    assert torch.equal(ours, others)
    ours, others = kept_by_both(torch.zeros(3, 64))
    assert (ours.sum(1) == 32).all() and torch.equal(ours.sum(1), others.sum(1))
    assert ours[:, :32].all()  # of equal ones the first, on every machine


def test_the_texts_do_not_depend_on_the_batch_or_on_interruptions(model, made, tmp_path):
    expected = documents(made)
    assert sum(document["tokens"] for document in expected) >= 300
    assert sum(document["tokens"] for document in expected[:-1]) < 300
    lines = tmp_path / "self.jsonl"
    whole = made.with_name("self.jsonl").read_bytes()
    lines.write_bytes(whole[: len(whole) // 2])  # as a kill in the middle of a line leaves it
    (tmp_path / "self.settings.json").write_bytes(made.with_name("self.settings.json").read_bytes())
    assert make(model, tmp_path, *OPTIONS, "--batch", "5")[0] == 0
    assert documents(tmp_path / "self") == expected


def test_it_is_a_source_that_counts_what_is_left_out(model, made, tmp_path, capsys):
    code, output = make(model, tmp_path, *OPTIONS, "--held-out", "0.3")
    message = capsys.readouterr().out
    sampled = documents(output)
    empty = sum(not document["text"].strip() for document in sampled)
    cut = sum(document["is_cut"] for document in sampled)
    assert code == 0 and empty and cut
    assert f"{empty} documents empty, {cut} cut" in message
    manifest, held_out = read_manifest(str(output)), read_manifest(f"{output}-held-out")
    assert manifest.kind == "text" and held_out.documents > 0
    assert manifest.dropped == {"empty": empty, "held_out": held_out.documents}
    assert manifest.documents + held_out.documents + empty == len(sampled)
    assert manifest.tokenizer.fingerprint == load_tokenizer(str(model)).fingerprint
    assert sampled == documents(made)  # the same seed


def test_first_tokens_may_come_from_the_vocabulary(model, made, tmp_path):
    code, output = make(model, tmp_path, *OPTIONS, "--prompt-tokens", "2", "--seed", "3")
    assert code == 0
    sampled = documents(output)
    assert all(2 <= document["tokens"] <= 22 for document in sampled)
    assert not any("<|" in document["text"] for document in sampled)


@pytest.fixture(scope="module")
def chat_model(tiny_tokenizer, tmp_path_factory):
    return make_chat_model(tmp_path_factory.mktemp("chat") / "model", tiny_tokenizer, steps=20)


def first_tokens(folder, output, start):
    """The text of each document, and what is drawn first after a token."""
    lm = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
    tokenizer = load_tokenizer(str(folder))
    with torch.no_grad():
        logits = lm(input_ids=torch.tensor([[start]])).logits[0, -1].double()
    logits[tokenizer.vocab_size :] = -torch.inf
    logits[sorted(tokenizer.special_ids - {tokenizer.eos_id, start})] = -torch.inf
    heights = logits.softmax(0).cumsum(0)
    for document in documents(output):
        number = document["document"]
        chance = np.random.default_rng(key_of(0, "self-replay", number)).random()
        drawn = int((heights <= chance * heights[-1]).sum())
        is_end = drawn in (tokenizer.eos_id, start)
        yield document["text"], "" if is_end else tokenizer.decode([drawn])


def test_texts_of_a_chat_model_begin_where_documents_do_in_pretraining(
    chat_model, tmp_path, capsys
):
    code, output = make(chat_model, tmp_path, *OPTIONS)
    assert code == 0
    start = load_tokenizer(str(chat_model)).backend.token_to_id("<|endoftext|>")
    found = list(first_tokens(chat_model, output, start))
    assert len(found) > 10 and any(first for _, first in found)
    assert all(text.startswith(first.rstrip("\N{REPLACEMENT CHARACTER}")) for text, first in found)
    settings = json.loads((tmp_path / "self.settings.json").read_text())
    assert settings["start"] == "<|endoftext|>"
    printed = capsys.readouterr().out
    assert "is a chat model: these texts keep what it knows" in printed
    assert "no token that is known to begin a document" not in printed


def test_where_no_token_separates_documents_the_user_is_told_so(chat_model, tmp_path, capsys):
    other = shutil.copytree(chat_model, tmp_path / "other")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        text = (other / name).read_text()
        (other / name).write_text(text.replace("<|endoftext|>", "<|of_nothing|>"))
    code, output = make(other, tmp_path, *OPTIONS)
    assert code == 0
    assert "no token that is known to begin a document" in capsys.readouterr().out
    assert "start" not in json.loads((tmp_path / "self.settings.json").read_text())
    found = list(first_tokens(other, output, load_tokenizer(str(other)).eos_id))
    assert all(text.startswith(first.rstrip("\N{REPLACEMENT CHARACTER}")) for text, first in found)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--temperature", "0"], "--temperature is 0, must be above 0"),
        (["--temperature", "nan"], "--temperature is nan, must be above 0"),
        (["--top-p", "1.5"], "--top-p is 1.5, must be above 0 and at most 1"),
        (["--max-tokens", "40"], "documents of 41 tokens with their start"),
        (["--held-out", "0.9"], "--held-out is 0.9"),
    ],
)
def test_what_is_not_allowed_is_reported(words, message, model, tmp_path, capsys):
    assert make(model, tmp_path, "--tokens", "10", *words)[0] == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "self.jsonl").exists()


def test_a_file_of_the_users_is_left_as_it_is(model, tmp_path, capsys):
    lines = '{"text": "one"}\n{"text": "two"}'
    (tmp_path / "self.jsonl").write_text(lines)
    assert make(model, tmp_path, "--tokens", "10")[0] == 2
    assert "self.jsonl exists and was not made by this command" in capsys.readouterr().err
    assert (tmp_path / "self.jsonl").read_text() == lines


def test_a_folder_without_weights_is_refused(model, tmp_path, capsys):
    bare = shutil.copytree(model, tmp_path / "bare", ignore=shutil.ignore_patterns("*.safetensors"))
    assert make(bare, tmp_path, "--tokens", "10")[0] == 2
    assert f"the model {bare} cannot be loaded" in capsys.readouterr().err


def test_lines_of_other_settings_are_not_gone_on_with(model, made, capsys):
    again = [*OPTIONS, "--temperature", "0.5"]
    assert make(model, made.parent, *again)[0] == 2
    message = capsys.readouterr().err
    assert "temperature is 0.5" in message or "holds" in message
