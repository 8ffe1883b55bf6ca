"""The preview shows what is trained: every token once, loss tokens marked, and no control character
for the terminal.
"""

import re

import numpy as np
import pytest
from support.corpora import generated_texts

from bigmix.commands.main import main
from bigmix.commands.row_view import MicroBatchId, ViewPiece, marked, preview, visible
from bigmix.data.records import Row, RowId
from bigmix.text.tokenizer import load_tokenizer
from bigmix.types import IGNORE

WHERE = MicroBatchId(rank=1, number=2)


@pytest.fixture(scope="module")
def tokenizer(tiny_tokenizer):
    return load_tokenizer(str(tiny_tokenizer))


def row_of(documents, loss_from, length):
    """A row of lists of ids; of each document the tokens from `loss_from` on are in the loss."""
    ids, labels = np.zeros(length, np.int64), np.full(length, IGNORE, np.int64)
    starts, at = [], 0
    for document in documents:
        starts.append(at)
        ids[at : at + len(document)] = document
        for t in range(max(loss_from, 1), len(document)):
            labels[at + t - 1] = document[t]
        at += len(document)
    return Row(
        id=RowId(source="chat", epoch=3, shard=4, row=5),
        ids_T=ids,
        positions_T=ids,
        labels_T=labels,
        starts_P=np.array(starts),
        documents_P=np.arange(7, 7 + len(documents)),
        num_tokens=at,
    )


def encoded(tokenizer, text, *, end=True):
    ids = tokenizer.encode([text])[0].tolist()
    return [*ids, tokenizer.eos_id] if end else ids


def test_every_token_is_shown_once_with_its_borders_and_padding(tokenizer):
    texts = ["the river café 混合 learns", "seven 😀👩‍👩‍👧 知识 keeps"]
    row = row_of([encoded(tokenizer, text) for text in texts], 3, 120)
    pieces = list(preview(row, WHERE, tokenizer, max_tokens=None))
    body = "".join(p.text for p in pieces if p.kind in ("context", "loss") and not p.is_special)
    assert body == "".join(texts)
    assert [p.text for p in pieces if p.is_special] == ["<|endoftext|>"] * 2
    heads = [p.text for p in pieces if p.kind == "head"]
    assert heads == [
        f"rank 1  micro-batch 2  chat  epoch 3  shard 4  row 5  {row.num_tokens} tokens  "
        f"{row.num_tokens - 6} in the loss  {row.num_tokens / 120:.1%} filled\n"
    ]
    borders = [p.text for p in pieces if p.kind == "border" and p.text.strip()]
    assert [text.split(",")[0] for text in borders] == ["── document 7", "── document 8"]
    assert pieces[-1] == ViewPiece(text=f"… {120 - row.num_tokens} padding\n", kind="padding")


def test_loss_tokens_are_those_that_are_predicted(tokenizer):
    ids = encoded(tokenizer, "the river under the tower")
    row = row_of([ids], 2, len(ids))
    pieces = list(preview(row, WHERE, tokenizer, max_tokens=None))
    context = "".join(p.text for p in pieces if p.kind == "context")
    assert context == tokenizer.decode(ids[:2])
    text = marked(pieces)
    assert text.count("[[") == 1 and "{{<|endoftext|>}}]]" in text


def test_a_character_of_several_tokens_is_not_broken(tokenizer):
    ids = encoded(tokenizer, "a ⚙𝄞ø b", end=False)
    assert len(ids) > 8  # none of these was in the tokenizer's training text
    pieces = list(preview(row_of([ids], 1, len(ids)), WHERE, tokenizer, max_tokens=None))
    assert all("\N{REPLACEMENT CHARACTER}" not in piece.text for piece in pieces)
    half = row_of([ids[:4]], 1, 8)
    assert any(
        "\N{REPLACEMENT CHARACTER}" in p.text
        for p in preview(half, WHERE, tokenizer, max_tokens=None)
    )


def test_a_long_row_is_cut_with_a_count(tokenizer):
    ids = encoded(tokenizer, " ".join(generated_texts(5)))
    row = row_of([ids], 1, len(ids))
    *_, last = preview(row, WHERE, tokenizer, max_tokens=10)
    assert last.text == f"… {len(ids) - 10} more tokens, --full shows them\n"


def test_no_control_character_reaches_the_terminal():
    hostile = "\x1b[2J\x07\x9b31m\u202eabc\u2028\x7f\r\ttext\n"
    shown = visible(hostile)
    assert not re.search(r"[\x00-\x09\x0b-\x1f\x7f-\x9f\u202e\u2028]", shown)
    assert "␛[2J" in shown and "<U+009B>" in shown and shown.endswith("text↵\n")


def test_signs_in_the_text_get_a_backslash():
    pieces = [ViewPiece(text="a [[b]] ", kind="context"), ViewPiece(text="{{c}}", kind="loss")]
    assert marked(pieces) == "a \\[[b\\]] [[\\{{c\\}}]]"


def test_the_command_shows_the_rows_of_a_rank(tmp_path, tiny_tokenizer, monkeypatch, capsys):
    (tmp_path / "web.txt").write_text("".join(generated_texts(120)) + "\x1b[31mred\x1b[0m")
    monkeypatch.chdir(tmp_path)

    def bigmix(*words, code=0):
        assert main(words) == code
        shown = capsys.readouterr()
        return shown.err if code else shown.out

    bigmix(
        "prepare",
        "web.txt",
        "--tokenizer",
        str(tiny_tokenizer),
        "--output",
        "web",
        "--processes",
        "1",
    )
    (tmp_path / "recipe.yaml").write_text(
        "model: {config: {model_type: llama}}\nsequence_length: 64\nrows_per_step: 8\n"
        "sources: {web: {path: web, role: task, share: 1}}\nbudget: {steps: 2}\n"
        "train: {lr: 1e-2, micro_batch_rows: 2}\ndeepspeed: ds_configs/cpu.json\noutput: run\n"
    )
    of_rank = ("--step", "2", "--rank", "1", "--ranks", "2", "--rows", "3", "--full")
    shown = bigmix("preview", "recipe.yaml", *of_rank)
    assert "\x1b" not in shown
    heads = [line for line in shown.splitlines() if line.startswith("rank 1  micro-batch ")]
    assert [head.split()[3] for head in heads] == ["0", "0", "1"]
    assert "… 1 more rows of this rank" in shown
    rows = bigmix("rows", "recipe.yaml", "--step", "2", "--ranks", "2").splitlines()
    own = [line.split() for line in rows if line.startswith("1 ")][:3]
    for head, named in zip(heads, own, strict=True):
        assert f"{named[2]}  epoch {named[3]}  shard {named[4]}  row {named[5]}  " in head
    refused = bigmix("preview", "recipe.yaml", "--step", "3", "--rank", "2", code=2)
    assert "--rank is 2 and --ranks is 1" in refused
    grown = ("sequence_length=[[0, 16], [1, 64]]", "pad_to_multiple=12", "--plain")
    for step, width in (("1", 24), ("2", 72)):
        shown = bigmix("preview", "recipe.yaml", *grown, "--step", step, "--rows", "8")
        filled = re.findall(r"([0-9]+) tokens .* ([0-9.]+)% filled", shown)
        assert len(filled) == 8
        assert all(float(part) == round(100 * int(n) / width, 1) for n, part in filled)
