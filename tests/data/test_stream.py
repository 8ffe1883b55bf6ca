"""A stream finds any row at once, gives each row once an epoch, and the same rows to any number of
ranks.
"""

from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.corpora import endless_plan, locate, one_stage, open_stream, write_source

from bigmix.data.loader import Loader, step_batch
from bigmix.data.mixture import Mixture
from bigmix.data.packing import PackingOptions
from bigmix.data.records import RankRows
from bigmix.data.run_plan import SequenceLengthStage
from bigmix.data.shards.manifest import Manifest, ShardTable, TokenizerEntry, read_manifest
from bigmix.data.shards.shard import open_shard
from bigmix.data.stream import Stream
from bigmix.errors import BigmixError
from bigmix.seeding import keys_of, shuffled
from bigmix.types import IGNORE

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


def stream(folders, name, seed=0, row_tokens=T, whole_below=0):
    path = str(folders[name])
    packing = PackingOptions(
        row_tokens=row_tokens, long_documents="truncate", whole_below=whole_below
    )
    return open_stream(name, path, packing, seed)


def plan(folders, shares=None):
    shares = shares or SHARES
    return endless_plan(
        Mixture(shares, 64), one_stage({name: stream(folders, name) for name in shares})
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
    epochs = [[locate(rows, epoch * count + i) for i in range(count)] for epoch in range(3)]
    for epoch, ids in enumerate(epochs):
        assert {row.epoch for row in ids} == {epoch}
        places = [(row.shard, row.row) for row in ids]
        assert len(set(places)) == count
        assert set(places) == {(row.shard, row.row) for row in rows.in_shard_order()}
    assert [r.row for r in epochs[0]] != [r.row for r in epochs[1]]


def assert_same_batch(batch, expected):
    assert (batch.step, batch.rows, batch.tokens) == (expected.step, expected.rows, expected.tokens)
    assert (
        batch.loss_tokens == expected.loss_tokens
        and batch.sum_sq_lengths == expected.sum_sq_lengths
    )
    for one, other in zip(batch.micro_batches, expected.micro_batches, strict=True):
        for name in ("ids_BT", "starts_P", "groups_P", "kept_N"):
            assert (getattr(one, name) == getattr(other, name)).all(), name


@pytest.mark.parametrize("whole_below", [0, 20])
@pytest.mark.parametrize("name", SHARES)
def test_rows_hold_the_documents_token_for_token(folders, name, whole_below):
    rows, seen = stream(folders, name, whole_below=whole_below), 0
    everything = documents(folders[name])
    used = dict.fromkeys(everything, 0)
    for row_id in rows.in_shard_order():
        row = rows.read(row_id)
        bounds = [*row.starts_P, row.num_tokens]
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
        assert (row.labels_T[row.num_tokens :] == IGNORE).all()
        assert (row.positions_T[row.num_tokens :] == np.arange(T - row.num_tokens)).all()
    assert seen == rows.tokens_per_epoch


@pytest.mark.parametrize("whole_below", [0, 20])
@pytest.mark.parametrize("name", SHARES)
def test_rows_are_counted_without_packing_as_many_as_packing_makes(folders, name, whole_below):
    rows = stream(folders, name, whole_below=whole_below)
    counted = Counter(row.shard for row in rows.in_shard_order())
    made = {shard: len(rows.table(shard).rows_R6) for shard in range(len(rows.manifest.shards))}
    assert counted == made


@pytest.mark.parametrize("ranks", [2, 4, 8])
def test_any_number_of_ranks_trains_the_same_rows(folders, ranks):
    the_plan = plan(folders)
    rank_rows = RankRows(rank=0, ranks=1, rows_per_step=64, micro_batch_rows=4)
    for step in (1, 2, 500, 1000):
        whole = step_batch(the_plan, rank_rows, step)
        parts = [
            step_batch(plan(folders), replace(rank_rows, rank=rank, ranks=ranks), step)
            for rank in range(ranks)
        ]
        rows = [
            row
            for rank in range(ranks)
            for row in plan(folders)
            .row_ids_of_rank(replace(rank_rows, rank=rank, ranks=ranks), step)
            .ids()
        ]
        assert rows == the_plan.row_ids(step)
        together = np.concatenate([m.ids_BT for part in parts for m in part.micro_batches])
        assert (together == np.concatenate([m.ids_BT for m in whole.micro_batches])).all()
        for name in SHARES:
            assert sum(part.loss_tokens[name] for part in parts) == whole.loss_tokens[name]
            assert all(part.rows[name] == whole.rows[name] for part in parts)


def test_no_rank_is_left_with_one_source(folders):
    ranks = 8
    rank_rows = RankRows(rank=0, ranks=ranks, rows_per_step=64, micro_batch_rows=8)
    seen = [set() for _ in range(ranks)]
    for step in range(1, 9):
        for rank in range(ranks):
            rows = plan(folders).row_ids_of_rank(replace(rank_rows, rank=rank), step).ids()
            seen[rank] |= {row.source for row in rows}
    assert all(sources == set(SHARES) for sources in seen)


def test_another_source_does_not_reshuffle_the_others(folders):
    alone, together = plan(folders, {"web": 1.0}), plan(folders)
    assert [locate(alone.streams["web"], i) for i in range(500)] == [
        locate(together.streams["web"], i) for i in range(500)
    ]


def test_another_seed_gives_another_order(folders):
    one, other = stream(folders, "web"), stream(folders, "web", seed=1)
    assert [locate(one, i) for i in range(50)] != [locate(other, i) for i in range(50)]


def test_the_loader_begins_anywhere_and_gives_the_same_batches(folders):
    rank_rows = RankRows(rank=1, ranks=2, rows_per_step=64, micro_batch_rows=8)
    loader = Loader(plan(folders), rank_rows, first=1, last=12, ahead=3)
    everything = list(loader)
    loader.close()
    assert [batch.step for batch in everything] == list(range(1, 13))
    for first in (1, 2, 7, 12):
        resumed = Loader(plan(folders), rank_rows, first=first, last=12, ahead=2)
        for batch, expected in zip(resumed, everything[first - 1 :], strict=True):
            assert_same_batch(batch, expected)
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
    rank_rows = RankRows(rank=0, ranks=1, rows_per_step=64, micro_batch_rows=8)
    loader = Loader(broken, rank_rows, first=1, last=3, ahead=2)
    with pytest.raises(BigmixError, match="shard-00000.tar cannot be read"):
        list(loader)
    loader.close()


def test_a_batch_is_its_rows_laid_on_one_another(folders):
    """The fast path against rows read one by one."""
    the_plan = plan(folders)
    rank_rows = RankRows(rank=1, ranks=2, rows_per_step=64, micro_batch_rows=8)
    names = list(SHARES)
    for step in (1, 7, 400):
        batch = step_batch(the_plan, rank_rows, step)
        rows = [the_plan.streams[r.source].read(r) for r in the_plan.row_ids(step)[rank_rows.rows]]
        for name in names:
            own = [row for row in rows if row.id.source == name]
            assert batch.tokens[name] == sum(row.num_tokens for row in own)
            loss_tokens = sum(int((row.labels_T != IGNORE).sum()) for row in own)
            assert batch.loss_tokens[name] == loss_tokens
        lengths = [np.diff([*row.starts_P, row.num_tokens]) for row in rows]
        assert batch.sum_sq_lengths == sum(int((each**2).sum()) for each in lengths)
        for at, micro in enumerate(batch.micro_batches):
            part = rows[at * 8 : at * 8 + 8]
            assert (micro.ids_BT == np.stack([row.ids_T for row in part])).all()
            labels = np.full(8 * T, IGNORE)
            labels[micro.kept_N] = micro.ids_BT.ravel()[micro.kept_N + 1]
            assert (labels == np.concatenate([row.labels_T for row in part])).all()
            ends = np.diff(micro.starts_P, append=8 * T)
            positions = np.arange(8 * T) - np.repeat(micro.starts_P, ends)
            assert (positions == np.concatenate([row.positions_T for row in part])).all()
            groups = np.repeat(micro.groups_P, ends).reshape(8, T)
            assert (groups == [[names.index(row.id.source)] for row in part]).all()


def curriculum(folders):
    stages = [
        SequenceLengthStage(
            first_step=first, streams={n: stream(folders, n, row_tokens=t) for n in SHARES}
        )
        for first, t in ((1, 8), (4, 16), (9, 32))
    ]
    return endless_plan(Mixture(SHARES, 64), stages)


def test_rows_change_their_length_at_their_steps_and_each_source_goes_on_where_it_was(folders):
    the_plan = curriculum(folders)
    rank_rows = RankRows(rank=0, ranks=2, rows_per_step=64, micro_batch_rows=8)
    widths = [
        step_batch(the_plan, rank_rows, k).micro_batches[0].ids_BT.shape[1] for k in range(1, 11)
    ]
    assert widths == [8] * 3 + [16] * 5 + [32] * 2
    for name in SHARES:
        rows = {n: the_plan.streams_at(n)[name].rows_per_epoch for n in (1, 4, 9)}
        drawn = {k: the_plan.mixture.counts(64 * k)[name] for k in (3, 8, 10)}
        epochs = drawn[3] / rows[1]
        assert the_plan.epochs(3)[name] == pytest.approx(epochs)
        epochs += (drawn[8] - drawn[3]) / rows[4]
        assert the_plan.epochs(8)[name] == pytest.approx(epochs, abs=1 / rows[4])
        epochs += (drawn[10] - drawn[8]) / rows[9]
        assert the_plan.epochs(10)[name] == pytest.approx(epochs, abs=2 / rows[9])


def test_a_plan_with_stages_gives_the_same_rows_from_wherever_it_is_asked(folders):
    rank_rows = RankRows(rank=1, ranks=4, rows_per_step=64, micro_batch_rows=8)
    loader = Loader(curriculum(folders), rank_rows, first=1, last=12, ahead=2)
    for batch in loader:
        assert_same_batch(step_batch(curriculum(folders), rank_rows, batch.step), batch)
    loader.close()


@settings(max_examples=60, deadline=None)
@given(
    count=st.integers(1, 3000),
    key=st.integers(0, 2**64 - 1),
    chosen=st.lists(st.integers(0, 2999), min_size=1, max_size=20),
)
def test_shuffled_is_a_permutation_whose_places_can_be_asked_for_alone(count, key, chosen):
    keys, counts = np.full(count, key, np.uint64), np.full(count, count)
    whole = shuffled(np.arange(count), counts, keys)
    assert sorted(whole.tolist()) == list(range(count))
    some = np.array([index % count for index in chosen])
    assert (shuffled(some, counts[some], keys[some]) == whole[some]).all()


def test_every_place_is_as_likely_as_any_other():
    """Where index 0 .. 4 of 5 and of 40 go over many keys, by the chi-squared test."""
    for count in (5, 40):
        keys = np.repeat(keys_of(1, np.arange(20_000)), count)
        indices = np.tile(np.arange(count), 20_000)
        places = shuffled(indices, np.full(len(indices), count), keys)
        table = np.zeros((count, count))
        np.add.at(table, (indices, places), 1)
        expected = 20_000 / count
        chi_squared = ((table - expected) ** 2 / expected).sum()
        freedom = (count - 1) ** 2
        assert abs(chi_squared - freedom) < 5 * np.sqrt(2 * freedom)


def simulated(shards):
    """A text source of shards of 64 million tokens each, of which only the manifest exists."""
    columns = {name: np.zeros(shards, np.int64) for name in ("bytes", "loss_tokens", "blocks_at")}
    columns |= {"documents": np.full(shards, 60_000), "blocks": np.full(shards, 500)}
    columns["tokens"] = 64_000_000 - np.arange(shards) % 1000
    texts = {name: np.full(shards, b"0") for name in ("file", "sha256", "blocks_check")}
    tokenizer = TokenizerEntry(name="t", fingerprint="f", vocab_size=9, bos_id=None, eos_id=0)
    manifest = Manifest(
        kind="text",
        dtype="uint16",
        tokenizer=tokenizer,
        template=None,
        read=1,
        dropped={},
        documents=1,
        tokens=1,
        loss_tokens=1,
        loss_bytes=1,
        shards=ShardTable(columns | texts),
    )
    return Stream("web", manifest, dict, PackingOptions(row_tokens=2048), lengths=None, seed=0)


def test_a_row_of_a_million_shards_is_found_as_one_of_ten():
    rows = simulated(1_000_000)
    far = 3 * rows.rows_per_epoch + 12_345_678_901
    place = locate(rows, far)
    assert place.epoch == 3 and place == rows.row_ids(np.array([0, far, 5])).ids()[1]
    # A window of neighbours comes from its sixteen shards, each about as often as the others.
    window = rows.row_ids(np.arange(16 * 31_250 // 2)).shards_R
    shards, counts = np.unique(window, return_counts=True)
    assert len(shards) == 16 and counts.min() > 0.9 * counts.max()


def test_neighbours_are_no_more_alike_than_in_a_true_shuffle():
    """Serial correlation of the place in the corpus, inside a window of shards."""
    rows = simulated(16)
    places = rows.row_ids(np.arange(100_000))
    corpus = places.shards_R * 31_250 + places.rows_R
    assert abs(np.corrcoef(corpus[:-1], corpus[1:])[0, 1]) < 0.012
    same_shard = (places.shards_R[:-1] == places.shards_R[1:]).mean()
    assert abs(same_shard - 1 / 16) < 0.005
