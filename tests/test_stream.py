"""A stream finds any row at once, gives each row once an epoch, and the same rows to any number of ranks."""

from dataclasses import replace

import numpy as np
import pytest
from corpora import write_source

from bigmix.data.loader import Loader, Plan, Portion, step_batch
from bigmix.data.manifest import read_manifest
from bigmix.data.mixture import Mixture
from bigmix.data.shards import open_shard
from bigmix.data.stream import Stream
from bigmix.errors import BigmixError
from bigmix.records import IGNORE

T = 32
SHARES = {"web": 0.57, "chat": 0.33, "code": 0.10}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    top = tmp_path_factory.mktemp("data")
    return {
        "web": write_source(top / "web", "text", shards=20, documents=5),
        "chat": write_source(top / "chat", "chat", seed=1),
        "code": write_source(top / "code", "text", seed=2, shards=1),
    }


def stream(folders, name, seed=0):
    path = str(folders[name])
    return Stream(
        name, path, read_manifest(path), row_tokens=T, long_documents="truncate", seed=seed
    )


def plan(folders, shares=None):
    shares = shares or SHARES
    return Plan(
        mixture=Mixture(shares, 64),
        streams={name: stream(folders, name) for name in shares},
        rows_per_step=64,
        seed=0,
    )


def documents(folder):
    """Every document of a source as (ids, mask), read in the plainest way."""
    manifest = read_manifest(str(folder))
    found = {}
    for index, entry in enumerate(manifest.shards):
        shard = open_shard(folder, entry, manifest.dtype)
        for document in range(entry.documents):
            start, stop = shard.offsets[document : document + 2]
            mask = shard.loss_mask(start, stop) if manifest.kind == "chat" else None
            found[index, document] = (shard.tokens(start, stop), mask)
    return found


@pytest.mark.parametrize("name", SHARES)
def test_every_row_comes_once_an_epoch_in_another_order_each_time(folders, name):
    rows = stream(folders, name)
    count = rows.rows_per_epoch
    epochs = [[rows.locate(epoch * count + i) for i in range(count)] for epoch in range(3)]
    for epoch, ids in enumerate(epochs):
        assert {row.epoch for row in ids} == {epoch}
        places = [(row.shard, row.row) for row in ids]
        assert len(set(places)) == count
        assert set(places) == {(row.shard, row.row) for row in rows.in_shard_order()}
    assert [r.row for r in epochs[0]] != [r.row for r in epochs[1]]


@pytest.mark.parametrize("name", SHARES)
def test_rows_hold_the_documents_token_for_token(folders, name):
    rows, seen = stream(folders, name), 0
    everything = documents(folders[name])
    used = dict.fromkeys(everything, 0)
    for row_id in rows.in_shard_order():
        row = rows.read(row_id)
        bounds = [*row.starts_P, row.tokens]
        for part, document in enumerate(row.documents_P):
            begin, end = bounds[part], bounds[part + 1]
            ids, mask = everything[row_id.shard, document]
            at = used[row_id.shard, document]
            n = end - begin
            used[row_id.shard, document] += n
            assert (row.ids_T[begin:end] == ids[at : at + n]).all()
            assert (row.positions_T[begin:end] == np.arange(n)).all()
            expected = ids[at + 1 : at + n].astype(np.int64)
            if mask is not None:
                expected = np.where(mask[at + 1 : at + n], expected, IGNORE)
            assert (row.labels_T[begin : end - 1] == expected).all()
            assert row.labels_T[end - 1] == IGNORE
            seen += n
        assert (row.labels_T[row.tokens :] == IGNORE).all()
        assert (row.positions_T[row.tokens :] == np.arange(T - row.tokens)).all()
    assert seen == rows.tokens_per_epoch


@pytest.mark.parametrize("ranks", [2, 4, 8])
def test_any_number_of_ranks_trains_the_same_rows(folders, ranks):
    the_plan = plan(folders)
    portion = Portion(rank=0, ranks=1, rows_per_step=64, micro_batch_rows=4)
    for step in (1, 2, 500, 1000):
        whole = step_batch(the_plan, portion, step)
        parts = [
            step_batch(plan(folders), replace(portion, rank=rank, ranks=ranks), step)
            for rank in range(ranks)
        ]
        assert [row for part in parts for row in part.row_ids] == list(whole.row_ids)
        together = np.concatenate([m.ids_BT for part in parts for m in part.micro_batches])
        assert (together == np.concatenate([m.ids_BT for m in whole.micro_batches])).all()
        for name in SHARES:
            assert sum(part.loss_tokens[name] for part in parts) == whole.loss_tokens[name]
            assert all(part.rows[name] == whole.rows[name] for part in parts)


def test_no_rank_is_left_with_one_source(folders):
    ranks = 8
    portion = Portion(rank=0, ranks=ranks, rows_per_step=64, micro_batch_rows=8)
    seen = [set() for _ in range(ranks)]
    for step in range(1, 9):
        for rank in range(ranks):
            batch = step_batch(plan(folders), replace(portion, rank=rank), step)
            seen[rank] |= {row.source for row in batch.row_ids}
    assert all(sources == set(SHARES) for sources in seen)


def test_another_source_does_not_reshuffle_the_others(folders):
    alone, together = plan(folders, {"web": 1.0}), plan(folders)
    assert [alone.streams["web"].locate(i) for i in range(500)] == [
        together.streams["web"].locate(i) for i in range(500)
    ]


def test_another_seed_gives_another_order(folders):
    one, other = stream(folders, "web"), stream(folders, "web", seed=1)
    assert [one.locate(i) for i in range(50)] != [other.locate(i) for i in range(50)]


def test_the_loader_begins_anywhere_and_gives_the_same_batches(folders):
    portion = Portion(rank=1, ranks=2, rows_per_step=64, micro_batch_rows=8)
    loader = Loader(plan(folders), portion, first=1, last=12, ahead=3)
    everything = list(loader)
    loader.close()
    assert [batch.step for batch in everything] == list(range(1, 13))
    for first in (1, 2, 7, 12):
        resumed = Loader(plan(folders), portion, first=first, last=12, ahead=2)
        for batch, expected in zip(resumed, everything[first - 1 :], strict=True):
            assert batch.row_ids == expected.row_ids
            assert (batch.micro_batches[0].ids_BT == expected.micro_batches[0].ids_BT).all()
        resumed.close()


def test_a_block_whose_content_changed_is_named_by_file_and_byte_when_it_is_read(tmp_path):
    folder = write_source(tmp_path / "web", "text")
    path = folder / "shard-00001.tar"
    content = bytearray(path.read_bytes())
    content[1500] ^= 1
    path.write_bytes(content)
    rows = stream({"web": folder}, "web")
    with pytest.raises(BigmixError, match=r"shard-00001\.tar: the block at byte"):
        for row_id in rows.in_shard_order():
            rows.read(row_id)


def test_a_fault_in_the_thread_reaches_the_loop(tmp_path, folders):
    folder = write_source(tmp_path / "web", "text")
    broken = plan({"web": folder}, {"web": 1.0})
    (folder / "shard-00000.tar").write_bytes(b"")
    portion = Portion(rank=0, ranks=1, rows_per_step=64, micro_batch_rows=8)
    loader = Loader(broken, portion, first=1, last=3, ahead=2)
    with pytest.raises(BigmixError, match="bytes, the manifest says"):
        list(loader)
    loader.close()
