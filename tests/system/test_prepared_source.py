"""A prepared source is read alike by webdataset, and a missing file is bad input."""

import json

import numpy as np
import pytest
import webdataset
from support.corpora import generated_texts

from bigmix.commands.main import main
from bigmix.commands.prepare.job import PrepareSettings, prepare
from bigmix.data.shards import shard as shard_module
from bigmix.data.shards.manifest import read_manifest
from bigmix.data.shards.shard import open_shard
from bigmix.errors import BAD_INPUT

TEXTS = generated_texts(700, seed=1)
ROWS = {
    "text": [{"text": text} for text in TEXTS],
    "chat": [
        {"prompt": asked, "response": answer}
        for asked, answer in zip(TEXTS, generated_texts(700, seed=2), strict=True)
    ],
}


@pytest.fixture
def given(tmp_path, tiny_tokenizer):
    """A function that writes rows and gives the settings to prepare them."""

    def made(rows):
        path = tmp_path / "rows.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        output = str(tmp_path / "out")
        base = {"inputs": [str(path)], "tokenizer": str(tiny_tokenizer), "output": output}
        return base | {"shard_tokens": 5000}

    return made


def documents_of(folder):
    manifest, found = read_manifest(str(folder)), []
    for entry in manifest.shards:
        shard = open_shard(folder, entry, manifest.dtype)
        for start, stop in zip(shard.offsets[:-1], shard.offsets[1:], strict=True):
            mask = shard.loss_mask(start, stop).tolist() if manifest.kind == "chat" else None
            found.append((shard.tokens(start, stop).tolist(), mask))
    return found


def documents_by_webdataset(folder):
    urls, found = sorted(map(str, folder.glob("*.tar"))), []
    for sample in webdataset.WebDataset(urls, shardshuffle=False).decode():
        ids, ends = sample["tokens.npy"], np.cumsum(sample["lengths.npy"])[:-1]
        masks = [None] * (len(ends) + 1)
        if "loss_mask.npy" in sample:
            bits = np.unpackbits(sample["loss_mask.npy"], count=len(ids), bitorder="little")
            masks = [part.astype(bool).tolist() for part in np.split(bits, ends)]
        found += zip([part.tolist() for part in np.split(ids, ends)], masks, strict=True)
    return found


@pytest.mark.parametrize("kind", ROWS)
def test_webdataset_reads_the_documents_that_we_read(tmp_path, given, kind, monkeypatch):
    monkeypatch.setattr(shard_module, "BLOCK_TOKENS", 700)  # several blocks in a shard
    made = prepare(PrepareSettings(**given(ROWS[kind]))).manifest
    assert made.kind == kind and len(made.shards) > 2
    assert all(entry.blocks > 1 for entry in made.shards[:-1])
    assert documents_by_webdataset(tmp_path / "out") == documents_of(tmp_path / "out")


@pytest.mark.parametrize("command", ["prepare", "tokenizer train"])
def test_a_missing_file_is_bad_input(tmp_path, capsys, command, tiny_tokenizer):
    more = ["--tokenizer", str(tiny_tokenizer)] if command == "prepare" else []
    words = [*command.split(), str(tmp_path / "no.jsonl"), "--output", str(tmp_path / "out")]
    assert main([*words, *more]) == BAD_INPUT
    assert "no.jsonl" in capsys.readouterr().err
    assert not list(tmp_path.glob("out/*"))
