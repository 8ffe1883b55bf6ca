"""A shard gives back what was written, to our reader and to webdataset, and a damaged one is
found.
"""

import json
import tarfile
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import webdataset
from hypothesis import given, settings
from hypothesis import strategies as st

from bigmix.data.shards import shard as shard_module
from bigmix.data.shards.location import MANIFEST
from bigmix.data.shards.manifest import (
    Manifest,
    TokenizerEntry,
    faults_of_shards,
    read_manifest,
    token_dtype,
    write_manifest,
)
from bigmix.data.shards.shard import ShardWriter, open_shard, with_lengths
from bigmix.errors import BadInput, BigmixError

EVERYTHING = 1 << 40


def documents(lengths, vocabulary=70_000, seed=0):
    draw = np.random.default_rng(seed)
    return [
        (draw.integers(0, vocabulary, length, np.uint32), draw.random(length) < 0.5)
        for length in lengths
    ]


def write(folder, written, *, dtype="uint32", masked=True, name="shard-000000.tar"):
    writer = ShardWriter(folder / name, dtype, masked=masked)
    for ids, mask in written:
        writer.add(ids, mask if masked else None)
    return writer.close()


def source(folder, entries):
    tokenizer = TokenizerEntry(name="t", fingerprint="f", vocab_size=70_000, bos_id=None, eos_id=0)
    tokens = sum(entry.tokens for entry in entries)
    manifest = Manifest(
        kind="chat",
        dtype="uint32",
        tokenizer=tokenizer,
        template=None,
        read=9,
        dropped={},
        documents=9,
        tokens=tokens,
        loss_tokens=1,
        loss_bytes=1,
        shards=tuple(entries),
    )
    manifest = with_lengths(folder, manifest)
    write_manifest(folder, manifest)
    return manifest


@pytest.mark.parametrize("masked", [True, False])
@settings(max_examples=30, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 40), min_size=1, max_size=30),
    block_tokens=st.sampled_from([1, 13, 64, 1 << 20]),
    cuts=st.lists(st.floats(0, 1), min_size=8, max_size=8),
)
def test_slices_of_a_shard_equal_those_of_the_flat_arrays(
    tmp_path_factory, masked, lengths, block_tokens, cuts
):
    folder = tmp_path_factory.mktemp("shard")
    written = documents(lengths)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shard_module, "BLOCK_TOKENS", block_tokens)
        entry = write(folder, written, masked=masked)
    shard = open_shard(folder, entry, "uint32")
    ids = np.concatenate([ids for ids, _ in written])
    mask = np.concatenate([mask for _, mask in written])
    assert shard.lengths.tolist() == lengths
    assert shard.offsets.tolist() == [0, *np.cumsum(lengths)]
    places = sorted(int(cut * len(ids)) for cut in cuts)
    for start, stop in [(0, len(ids)), *pairwise(places)]:
        if start == stop:
            continue
        assert shard.tokens(start, stop).tolist() == ids[start:stop].tolist()
        if masked:
            assert shard.loss_mask(start, stop).tolist() == mask[start:stop].tolist()


def test_webdataset_reads_the_same_tokens_lengths_and_masks(tmp_path, monkeypatch):
    monkeypatch.setattr(shard_module, "BLOCK_TOKENS", 50)
    written = documents([30, 30, 5, 70, 1])
    entry = write(tmp_path, written)
    samples = list(webdataset.WebDataset(str(tmp_path / entry.file), shardshuffle=False).decode())
    assert len(samples) == entry.blocks > 1
    tokens = np.concatenate([sample["tokens.npy"] for sample in samples])
    lengths = np.concatenate([sample["lengths.npy"] for sample in samples])
    masks = np.concatenate(
        [
            np.unpackbits(s["loss_mask.npy"], count=len(s["tokens.npy"]), bitorder="little")
            for s in samples
        ]
    )
    assert tokens.tolist() == np.concatenate([ids for ids, _ in written]).tolist()
    assert lengths.tolist() == [len(ids) for ids, _ in written]
    assert masks.tolist() == np.concatenate([mask for _, mask in written]).tolist()


def test_loss_tokens_are_the_mask_of_a_chat_and_all_but_the_first_of_a_text(tmp_path):
    written = documents([7, 1, 4])
    masked = write(tmp_path, written)
    plain = write(tmp_path, written, masked=False, name="text.tar")
    assert masked.loss_tokens == sum(int(mask.sum()) for _, mask in written)
    assert plain.loss_tokens == 6 + 0 + 3


def test_the_same_documents_give_the_same_bytes(tmp_path):
    first = write(tmp_path, documents([5, 6]), name="a.tar")
    second = write(tmp_path, documents([5, 6]), name="b.tar")
    assert first.sha256 == second.sha256
    with tarfile.open(tmp_path / "a.tar") as tar:
        assert {(info.mtime, info.uid, info.uname) for info in tar} == {(0, 0, "")}


@pytest.mark.parametrize("masked", [True, False])
@pytest.mark.parametrize("size", [1, 3, 30])
def test_documents_added_together_give_the_bytes_of_one_by_one(tmp_path, monkeypatch, masked, size):
    monkeypatch.setattr(shard_module, "BLOCK_TOKENS", 50)
    written = documents([30, 20, 5, 70, 1, 120, 3, 46, 2, 60])
    one = write(tmp_path, written, masked=masked, name="one.tar")
    writer = ShardWriter(tmp_path / "many.tar", "uint32", masked=masked)
    for at in range(0, len(written), size):
        ids, masks = zip(*written[at : at + size], strict=True)
        lengths = np.array([len(each) for each in ids])
        writer.add_many(np.concatenate(ids), lengths, np.concatenate(masks) if masked else None)
    many = writer.close()
    assert replace(many, file=one.file) == one
    assert (tmp_path / "many.tar").read_bytes() == (tmp_path / "one.tar").read_bytes()


def test_a_shard_has_its_name_only_when_it_is_whole(tmp_path):
    writer = ShardWriter(tmp_path / "s.tar", "uint16", masked=False)
    writer.add(np.arange(5, dtype=np.uint32), None)
    assert not (tmp_path / "s.tar").exists()
    writer.abort()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("size", "dtype"), [(2, "uint16"), (65_536, "uint16"), (65_537, "uint32")])
def test_the_type_holds_the_largest_id(tmp_path, size, dtype):
    assert token_dtype(size) == dtype
    entry = write(tmp_path, [(np.array([size - 1], np.uint32), np.array([True]))], dtype=dtype)
    assert open_shard(tmp_path, entry, dtype).tokens(0, 1).tolist() == [size - 1]


def test_a_manifest_reads_back_equal(tmp_path):
    manifest = source(tmp_path, [write(tmp_path, documents([5, 6]))])
    assert read_manifest(str(tmp_path)) == manifest
    assert faults_of_shards(str(tmp_path), manifest, checksum_bytes=EVERYTHING) == []


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"[]",
        b"null",
        b"3",
        b'{"version": 1}',
        b'{"version": 2}',
        b'{"version": 2, "shards": {"file": []}}',
        b"\x00",
        b"{}",
        b"\xff",
    ],
)
def test_a_manifest_that_is_not_whole_is_refused(tmp_path, content):
    (tmp_path / MANIFEST).write_bytes(content)
    with pytest.raises(BadInput, match="prepare the source again"):
        read_manifest(str(tmp_path))


def test_a_manifest_cut_anywhere_or_with_a_key_too_many_is_refused(tmp_path):
    source(tmp_path, [write(tmp_path, documents([5, 6]))])
    path = tmp_path / MANIFEST
    text = path.read_text().rstrip()
    for length in range(0, len(text), 11):
        path.write_text(text[:length])
        with pytest.raises(BadInput):
            read_manifest(str(tmp_path))
    path.write_text(json.dumps(json.loads(text) | {"colour": 1}))
    with pytest.raises(BadInput):
        read_manifest(str(tmp_path))


def test_a_folder_without_a_manifest_is_not_a_source(tmp_path):
    with pytest.raises(BadInput, match="bigmix prepare"):
        read_manifest(str(tmp_path))


def damage(path, how):
    content = path.read_bytes()
    if how == "missing":
        path.unlink()
    elif how == "shorter":
        path.write_bytes(content[:-512])
    elif how == "no tar":
        path.write_bytes(b"\0" * len(content))
    else:  # one bit, in the middle of the tokens
        place = 1000
        path.write_bytes(content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :])


@pytest.mark.parametrize(
    ("how", "message"),
    [("missing", "missing"), ("shorter", "bytes"), ("no tar", "sha256"), ("one bit", "sha256")],
)
def test_each_damaged_shard_is_named_with_its_fault(tmp_path, how, message):
    entries = [write(tmp_path, documents([900]), name=f"{n}.tar") for n in range(3)]
    manifest = source(tmp_path, entries)
    damage(tmp_path / "0.tar", how)
    damage(tmp_path / "2.tar", how)
    faults = faults_of_shards(str(tmp_path), manifest, checksum_bytes=EVERYTHING)
    assert len(faults) == 2
    assert "0.tar" in faults[0] and "2.tar" in faults[1]
    assert all(message in fault for fault in faults)


def test_checksums_stop_at_their_budget(tmp_path):
    entries = [write(tmp_path, documents([900]), name=f"{n}.tar") for n in range(3)]
    manifest = source(tmp_path, entries)
    damage(tmp_path / "2.tar", "one bit")
    assert not faults_of_shards(str(tmp_path), manifest, checksum_bytes=2 * entries[0].bytes)
    assert faults_of_shards(str(tmp_path), manifest, checksum_bytes=3 * entries[0].bytes)


def test_the_lengths_of_a_chat_source_are_next_to_its_shards(tmp_path):
    entries = [write(tmp_path, documents([9, 4, n]), name=f"{n}.tar") for n in (1, 2)]
    manifest = source(tmp_path, entries)
    assert np.load(tmp_path / manifest.lengths.file).tolist() == [9, 4, 1, 9, 4, 2]


def test_any_flipped_bit_in_what_is_read_is_named_by_file_and_byte(tmp_path, monkeypatch):
    monkeypatch.setattr(shard_module, "BLOCK_TOKENS", 50)
    entry = write(tmp_path, documents([30, 30, 5, 70, 1]))
    path = tmp_path / entry.file
    content = path.read_bytes()
    with tarfile.open(path) as tar:
        arrays = [(info.offset_data + 128, info.offset_data + info.size) for info in tar]
    for begin, end in arrays:
        at = (begin + end) // 2
        path.write_bytes(content[:at] + bytes([content[at] ^ 4]) + content[at + 1 :])
        with pytest.raises(BigmixError, match=rf"{entry.file}: the block at byte {begin} "):
            shard = open_shard(tmp_path, entry, "uint32")
            shard.tokens(0, int(shard.offsets[-1]))
            shard.loss_mask(0, int(shard.offsets[-1]))


def test_a_shard_cut_short_is_refused_when_it_is_opened(tmp_path):
    entry = write(tmp_path, documents([900]))
    path = tmp_path / entry.file
    for size in (0, 1, 511, entry.bytes - 1):
        path.write_bytes(path.read_bytes()[:size])
        with pytest.raises(BigmixError, match=entry.file):
            open_shard(tmp_path, entry, "uint32")
