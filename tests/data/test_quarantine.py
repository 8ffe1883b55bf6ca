"""Rows of a bad shard are replaced by rows of healthy ones: which ones is a pure function, and
every rank agrees on it.
"""

import gc
import json
import pickle
import shutil
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.corpora import endless_plan, one_stage, open_stream, write_source
from support.downloads import downloads, in_use, log_unforeseen, serve, unforeseen
from support.recipes import with_quarantine
from support.servers import web_server

from bigmix.commands.main import main
from bigmix.commands.plan.counts import row_counts
from bigmix.data import run_plan
from bigmix.data.loader import open_loader, step_batch
from bigmix.data.mixture import Mixture
from bigmix.data.packing import PackingOptions
from bigmix.data.quarantine import BadShard, Quarantine, substitution
from bigmix.data.records import RankRows
from bigmix.data.run_plan import SequenceLengthStage
from bigmix.data.shards.cache import CacheFull
from bigmix.data.shards.retry import Stopped
from bigmix.data.source import needed_in_order, read_source
from bigmix.data.stream import WINDOW_SHARDS
from bigmix.errors import BadInput, BigmixError
from bigmix.recipe import load_recipe
from bigmix.train.inputs import open_inputs

SHARES = {"web": 0.5, "chat": 0.3, "code": 0.2}
ROWS = 64
BAD = Quarantine(
    first_steps={
        "web": {"shard-00003.tar": 5, "shard-00017.tar": 5, "shard-00030.tar": 9},
        "chat": {"shard-00001.tar": 7},
    }
)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    top = tmp_path_factory.mktemp("data")
    return {
        "web": write_source(top / "web", "text", shards=40, documents=5),
        "chat": write_source(top / "chat", "chat", seed=1, shards=4),
        "code": write_source(top / "code", "text", seed=2, shards=1),
    }


def streams(folders, row_tokens=32):
    packing = PackingOptions(row_tokens=row_tokens, long_documents="truncate")
    return {name: open_stream(name, str(folders[name]), packing) for name in SHARES}


def plan(folders, quarantine=BAD, lengths=((1, 32),)):
    stages = [
        SequenceLengthStage(first_step=first, streams=streams(folders, n)) for first, n in lengths
    ]
    mixture = Mixture(SHARES, ROWS)
    return endless_plan(mixture, stages).with_quarantine(quarantine)


def rank_rows(rank=0, ranks=1):
    return RankRows(rank=rank, ranks=ranks, rows_per_step=ROWS, micro_batch_rows=4)


def shard_of(file):
    return int(file[6:11])


def is_bad(row, step, quarantine=BAD):
    files = quarantine.first_steps.get(row.source, {})
    return any(shard_of(file) == row.shard and first <= step for file, first in files.items())


LENGTHS = [((1, 32),), ((1, 16), (6, 32), (8, 48))]


@pytest.mark.parametrize("lengths", LENGTHS)
def test_rows_of_bad_shards_change_from_their_first_step_on_and_no_others(folders, lengths):
    before, after = plan(folders, Quarantine(), lengths), plan(folders, BAD, lengths)
    for step in range(1, 40):
        for old, new in zip(before.row_ids(step), after.row_ids(step), strict=True):
            if is_bad(old, step):
                assert (new.source, new.epoch) == (old.source, old.epoch)
                assert not is_bad(new, step)
                rows = after.streams_at(step)[new.source].in_shard_order()
                assert (new.shard, new.row) in {(row.shard, row.row) for row in rows}
            else:
                assert new == old
        assert before.epochs(step) == after.epochs(step)


@pytest.mark.parametrize("lengths", LENGTHS)
def test_the_count_of_a_step_is_that_of_a_loop_over_its_rows(folders, lengths):
    before, after = plan(folders, Quarantine(), lengths), plan(folders, BAD, lengths)
    total = 0
    for step in range(1, 40):
        counted = Counter(row.source for row in before.row_ids(step) if is_bad(row, step))
        assert after.substituted(step) == {name: counted[name] for name in SHARES}
        assert step_batch(after, rank_rows(1, 2), step).substituted == after.substituted(step)
        assert before.substituted(step) == dict.fromkeys(SHARES, 0)
        total += sum(counted.values())
    assert total > 100


@pytest.mark.parametrize("rows_together", [1, 200, 1024])
@pytest.mark.parametrize("lengths", LENGTHS)
@pytest.mark.parametrize("ranks", [1, 2, pytest.param(8, marks=pytest.mark.slow)])
def test_the_rows_are_the_same_on_any_ranks_however_many_are_read_together(
    folders, monkeypatch, ranks, lengths, rows_together
):
    monkeypatch.setattr(run_plan, "ASSEMBLED_ROWS", rows_together)
    whole = plan(folders, BAD, lengths)
    for step in (1, 4, 5, 6, 7, 9, 12, 30):
        rows = [
            row
            for rank in range(ranks)
            for row in whole.row_ids_of_rank(rank_rows(rank, ranks), step).ids()
        ]
        assert rows == whole.row_ids(step)
        parts = [step_batch(whole, rank_rows(rank, ranks), step) for rank in range(ranks)]
        found = np.concatenate([m.ids_BT for part in parts for m in part.micro_batches])
        read = [whole.streams_at(step)[row.source].read(row).ids_T for row in rows]
        assert (found == np.stack(read)).all()


@pytest.mark.parametrize("lengths", LENGTHS)
def test_what_is_fetched_ahead_is_what_is_read(folders, monkeypatch, lengths):
    monkeypatch.setattr(run_plan, "ASSEMBLED_ROWS", 96)
    the_plan, own = plan(folders, BAD, lengths), rank_rows(1, 4)
    for first in (1, 5, 6):
        gathered = [p for stage in the_plan.gathered(own, first=first, last=20) for p in stage]
        rows = [row for places in gathered for row in places.ids()]
        read = [
            row for step in range(first, 21) for row in the_plan.row_ids_of_rank(own, step).ids()
        ]
        # What is read together with the first step may begin before it, and with the last one end
        # behind it.
        assert any(rows[at : at + len(read)] == read for at in range(0, 96, 16))
        assert len(rows) < len(read) + 96


def test_a_run_that_finds_a_shard_bad_on_its_way_goes_on_as_one_that_is_resumed_there(folders):
    """Steps before the first one of a quarantine are not read again: their rows would be those of
    the bad shard.
    """
    grown = plan(folders, Quarantine(first_steps={"web": {"shard-00003.tar": 5}}))
    for step in range(1, 9):
        step_batch(grown, rank_rows(), step)
    grown = grown.with_quarantine(BAD)
    for step in (9, 10, 40):
        resumed = plan(folders, Quarantine.from_json(BAD.to_json()))
        for other in (
            step_batch(resumed, rank_rows(), step),
            step_batch(plan(folders), rank_rows(), step),
        ):
            batch = step_batch(grown, rank_rows(), step)
            for one, two in zip(batch.micro_batches, other.micro_batches, strict=True):
                assert (one.ids_BT == two.ids_BT).all()
            assert (batch.rows, batch.substituted) == (other.rows, other.substituted)


def test_another_order_of_the_shards_replaces_the_same_files(folders, tmp_path):
    first, *rest = (f"shard-{index:05d}.tar" for index in range(4))
    pattern = f"{folders['chat']}/shard-{{{','.join(n[6:11] for n in (*rest, first))}}}.tar"
    packing = PackingOptions(row_tokens=32, long_documents="truncate")
    stages = one_stage({"chat": open_stream("chat", pattern, packing)})
    turned = endless_plan(Mixture({"chat": 1.0}, ROWS), stages, quarantine=BAD)
    shards = Counter(row.shard for step in range(7, 12) for row in turned.row_ids(step))
    assert set(shards) == {1, 2, 3} and turned.substituted(7)["chat"] > 0


def test_shards_and_sources_that_are_not_listed_any_more_replace_nothing(folders):
    gone = Quarantine(first_steps={"web": {"shard-99999.tar": 1}, "old": {"shard-00000.tar": 1}})
    the_plan = plan(folders, gone)
    assert the_plan.row_ids(3) == plan(folders, Quarantine()).row_ids(3)
    assert the_plan.substituted(3) == dict.fromkeys(SHARES, 0)


def test_a_source_with_no_healthy_shard_ends_the_run(folders):
    bad = {"chat": {f"shard-{index:05d}.tar": 9 for index in range(4)}}
    with pytest.raises(BigmixError, match="no shard of chat is left to train on: 4 of 4 are bad"):
        plan(folders, Quarantine(first_steps=bad))


@settings(max_examples=200, deadline=None)
@given(
    rows=st.lists(st.integers(0, 40), min_size=2, max_size=50),
    bad=st.sets(st.integers(0, 49), min_size=1, max_size=30),
    key=st.integers(0, 2**64 - 1),
)
def test_substitutes_are_spread_evenly_over_the_healthy_shards_of_the_window(rows, bad, key):
    bad = {shard for shard in bad if shard < len(rows)}
    healthy = [shard for shard in range(len(rows)) if shard not in bad]
    if not any(rows[shard] for shard in healthy):
        return
    rows_S, is_bad_S = np.array(rows), np.isin(np.arange(len(rows)), list(bad))
    found = substitution(rows_S, is_bad_S, window_shards=WINDOW_SHARDS, key=key)
    able = sorted({shard // WINDOW_SHARDS for shard in healthy if rows[shard]})
    for window in range(-(-len(rows) // WINDOW_SHARDS)):
        wanted = [
            (s, r) for s in sorted(bad) if s // WINDOW_SHARDS == window for r in range(rows[s])
        ]
        if not wanted:
            continue
        shards_R, rows_R = found.of(*np.array(wanted).T)
        nearest = min(able, key=lambda other: abs(other - window))
        assert set((shards_R // WINDOW_SHARDS).tolist()) == {nearest}
        givers = {s: rows[s] for s in healthy if s // WINDOW_SHARDS == nearest}
        given_by, total = Counter(shards_R.tolist()), sum(givers.values())
        for shard, count in givers.items():
            assert abs(given_by[shard] - len(wanted) * count / total) < 2
        often = Counter(zip(shards_R.tolist(), rows_R.tolist(), strict=True))
        assert max(often.values()) <= -(-len(wanted) // total)
        assert all(0 <= row < givers[shard] for shard, row in often)


def test_substitutes_open_no_more_shards_than_the_rows_that_they_stand_for(folders, monkeypatch):
    monkeypatch.setattr(run_plan, "ASSEMBLED_ROWS", 16)
    sources = {name: read_source(str(folder)) for name, folder in folders.items()}

    def opened_shards(quarantine):
        the_plan = plan(folders, quarantine)
        stages = the_plan.gathered(rank_rows(1, 4), first=9, last=300)
        never = dict.fromkeys(sources, 1_000)
        return Counter(
            source.location.given for source, _ in needed_in_order(stages, sources, never)
        )

    before, after = opened_shards(Quarantine()), opened_shards(BAD)
    web = str(folders["web"])
    assert 40 < after[web] <= before[web]


def test_each_epoch_has_other_substitutes(folders):
    stream = streams(folders)["chat"]
    count = stream.rows_per_epoch

    def substitutes(epoch):
        indices = np.arange(epoch * count, (epoch + 1) * count)
        before, after = stream.row_ids(indices), stream.row_ids(indices, frozenset({1}))
        own = before.shards_R == 1
        return set(zip(after.shards_R[own].tolist(), after.rows_R[own].tolist(), strict=True))

    assert len(substitutes(0)) == len(substitutes(1)) and substitutes(0) != substitutes(1)


def bad(source, file, reason="gone"):
    return BadShard(source, shard_of(file), file, reason)


def test_a_quarantine_grows_in_whatever_order_the_ranks_report():
    found = [
        bad("web", "shard-00002.tar"),
        bad("chat", "shard-00000.tar"),
        bad("web", "shard-00001.tar"),
    ]
    one, new = Quarantine().extended([*found, found[0]], 4)
    other, _ = Quarantine().extended(reversed(found), 4)
    assert one == other and [b.file for b in new] == [
        "shard-00000.tar",
        "shard-00001.tar",
        "shard-00002.tar",
    ]
    assert one.extended(found, 9) == (one, [])
    earlier, again = one.extended(found[:1], 2)
    assert again == found[:1] and earlier.first_steps["web"] == {
        "shard-00001.tar": 4,
        "shard-00002.tar": 2,
    }
    assert Quarantine.from_json(earlier.to_json()) == earlier and Quarantine().to_json() == {}
    assert earlier.steps == [2, 4]


def test_a_bad_shard_can_be_sent_to_another_rank():
    sent = bad("web", "shard-00002.tar", "it has 3 bytes")
    got = pickle.loads(pickle.dumps(sent))
    assert (
        str(got) == "the shard shard-00002.tar of web cannot be used: it has 3 bytes" == str(sent)
    )
    assert (got.source, got.shard, got.file, got.reason) == (
        "web",
        2,
        "shard-00002.tar",
        "it has 3 bytes",
    )


# From here on shards are really damaged, and read by several ranks.

RECIPE = """\
model: {{config: {{model_type: llama}}}}
sequence_length: 64
rows_per_step: 8
sources:
  web: {{path: "{at}/web", role: replay, share: 0.4}}
  chat: {{path: "{at}/chat", role: task, share: 0.6}}
budget: {{steps: 60}}
train: {{lr: 1e-2, micro_batch_rows: 2}}
deepspeed: ds_configs/cpu.json
output: run
cache: {{folder: {cache}, timeout_s: 0.2, tries: 2}}
bad_shards: replace
"""


@pytest.fixture
def data(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_source(tmp_path / "data" / "web", "text", shards=20, documents=5)
    write_source(tmp_path / "data" / "chat", "chat", seed=1, shards=5)
    write_source(tmp_path / "data" / "held", "chat", seed=1, shards=2)
    return tmp_path / "data"


def opened(at, *overrides, cache="cache", verify=False):
    Path("recipe.yaml").write_text(RECIPE.format(at=at, cache=cache))
    return open_inputs(load_recipe("recipe.yaml", overrides), ranks=2, verify=verify)


def trained(inputs_of_ranks, first=1, last=60):
    """What all ranks train, step by step, and the quarantine at the end: the loop of a run without
    its cluster.
    """
    quarantine, steps = inputs_of_ranks[0].plan.quarantine, {}
    while first <= last:
        inputs_of_ranks = [with_quarantine(inputs, quarantine) for inputs in inputs_of_ranks]
        own = [RankRows(rank=r, ranks=2, rows_per_step=8, micro_batch_rows=2) for r in range(2)]
        loaders = [
            open_loader(i.plan, i.sources, i.shard_store, p, first=first, ahead=2)
            for i, p in zip(inputs_of_ranks, own, strict=True)
        ]
        batches, found = [iter(loader) for loader in loaders], []
        while first <= last and not found:
            parts = []
            for rank in batches:
                try:
                    parts.append(next(rank))
                except BadShard as fault:
                    found.append(fault)
            if not found:
                assert {part.step for part in parts} == {first}
                ids = [m.ids_BT.tolist() for part in parts for m in part.micro_batches]
                steps[first] = (ids, parts[0].substituted)
                first += 1
        for inputs, loader in zip(inputs_of_ranks, loaders, strict=True):
            inputs.shard_store.close()
            loader.close()
        if found:
            quarantine, new = quarantine.extended(found, first)
            assert new
    return steps, quarantine


def flip(path):
    content = bytearray(path.read_bytes())
    content[650] ^= 1  # a token
    path.write_bytes(content)


LOCAL_HARM = {
    "flip": flip,
    "truncate": lambda path: path.write_bytes(path.read_bytes()[:-700]),
    "empty": lambda path: path.write_bytes(b""),
    "delete": lambda path: path.unlink(),
}


@pytest.mark.parametrize("harm", LOCAL_HARM)
def test_a_run_goes_on_where_local_shards_are_damaged(data, tmp_path, harm):
    shutil.copytree(data, tmp_path / "whole")
    for name in ("web/shard-00003.tar", "web/shard-00011.tar", "chat/shard-00002.tar"):
        LOCAL_HARM[harm](data / name)
    steps, quarantine = trained([opened(data) for _ in range(2)])
    assert set(quarantine.first_steps["web"]) == {"shard-00003.tar", "shard-00011.tar"}
    assert set(quarantine.first_steps["chat"]) == {"shard-00002.tar"}
    assert list(steps) == list(range(1, 61))
    # The same rows come from whole shards with that quarantine from the start, also where the run
    # is resumed.
    whole = [with_quarantine(opened(tmp_path / "whole"), quarantine) for _ in range(2)]
    for first in (1, 20):
        expected, same = trained(whole, first)
        assert same == quarantine and expected == {k: steps[k] for k in range(first, 61)}
    assert sum(sum(counts.values()) for _, counts in steps.values()) > 20


def test_the_default_is_to_fail_and_to_name_source_and_shard(data):
    assert load_recipe_default() == "fail"
    flip(data / "web" / "shard-00003.tar")
    inputs = opened(data)
    loader = open_loader(
        inputs.plan,
        inputs.sources,
        inputs.shard_store,
        RankRows(rank=0, ranks=1, rows_per_step=8, micro_batch_rows=2),
        first=1,
        ahead=2,
    )
    with pytest.raises(BadShard) as caught:
        list(loader)
    loader.close()
    message = str(caught.value)
    assert "shard-00003.tar of web cannot be used" in message and "the block at byte" in message
    assert caught.value.exit_code == 1 and "restore the file or prepare the source again" in message


def load_recipe_default():
    text = Path("default.yaml")
    text.write_text(RECIPE.format(at="x", cache="c").replace("bad_shards: replace\n", ""))
    return load_recipe("default.yaml").bad_shards


def test_a_mapped_shard_that_is_cut_short_is_bad_and_ends_no_process(data):
    packing = PackingOptions(row_tokens=32)
    stream = open_stream("web", str(data / "web"), packing)
    row = next(row for row in stream.in_shard_order() if row.shard == 4)
    whole = stream.read(row).ids_T.tolist()
    with (data / "web" / "shard-00004.tar").open("r+b") as file:
        file.truncate(100)
    with pytest.raises(BadShard, match=r"has 100 bytes and had \d+ when it was opened"):
        stream.read(row)
    (data / "web" / "shard-00005.tar").unlink()
    other = next(row for row in stream.in_shard_order() if row.shard == 6)
    stream.read(other)
    (data / "web" / "shard-00006.tar").unlink()  # mapped files may be deleted
    assert stream.read(other).num_tokens and whole


@pytest.fixture
def server(data):
    with web_server() as server:
        serve(server, data)
        yield server


REMOTE_HARM = {
    "500": ("status", 500, {}),
    "404": ("status", 404, {}),
    "403": ("status", 403, {}),
    "short": None,  # what the server has is shorter than what is listed
    "nothing": ("truncate", 0),
    "stall": ("stall", 0),
    "flip": ("flip", 650),
}
QUICK = ("500", "short", "stall", "flip")


@pytest.mark.parametrize("ranges", [pytest.param(False, marks=pytest.mark.slow), True])
@pytest.mark.parametrize(
    "harm",
    [harm if harm in QUICK else pytest.param(harm, marks=pytest.mark.slow) for harm in REMOTE_HARM],
)
def test_a_run_goes_on_where_remote_shards_are_damaged(data, server, tmp_path, harm, ranges):
    broken = ["/web/shard-00003.tar", *([] if harm == "stall" else ["/chat/shard-00002.tar"])]
    whole = {path: server.files[path] for path in broken}
    server.broken = dict.fromkeys(broken, REMOTE_HARM[harm])
    if harm == "short":
        server.files |= {path: content[:700] for path, content in whole.items()}
    read = f"cache.read={'ranges' if ranges else 'whole'}"
    steps, quarantine = trained([opened(server.url, read) for _ in range(2)])
    found = {
        f"/{source}/{file}" for source, files in quarantine.first_steps.items() for file in files
    }
    assert found == set(broken)
    assert steps == trained([with_quarantine(opened(data), quarantine) for _ in range(2)])[0]
    # Where the files are whole again nothing is left of the fault.
    server.broken = {}
    server.files |= whole
    healed = [opened(server.url, read) for _ in range(2)]
    assert trained(healed) == trained([opened(data) for _ in range(2)])


def test_a_bad_shard_is_tried_no_longer_than_once_for_each_rank_that_needs_it(data, server, caplog):
    log_unforeseen(caplog)
    server.broken = {"/web/shard-00003.tar": ("status", 500, {})}
    inputs = [opened(server.url) for _ in range(2)]
    _, quarantine = trained(inputs)
    assert set(quarantine.first_steps) == {"web"}
    tried = downloads(server)
    # Two tries each, and what both had under way ahead of need once more.
    assert tried.pop("/web/shard-00003.tar") <= 8 and set(tried.values()) == {1}
    assert unforeseen(caplog) == 0


def test_after_a_failure_no_step_ahead_tries_the_same_shard_again(data, server, monkeypatch):
    monkeypatch.setattr(run_plan, "ASSEMBLED_ROWS", 8)
    server.broken = {"/web/shard-00003.tar": ("status", 500, {})}
    inputs = opened(server.url, "cache.read=ranges")
    own = RankRows(rank=0, ranks=1, rows_per_step=8, micro_batch_rows=2)
    loader = open_loader(inputs.plan, inputs.sources, inputs.shard_store, own, first=1, ahead=60)
    with pytest.raises(BadShard):
        list(loader)
    time.sleep(1)
    inputs.shard_store.close()
    loader.close()
    assert downloads(server)["/web/shard-00003.tar"] == 2


def test_a_long_run_whose_healthy_shards_are_all_open_begins_at_once(data, server):
    """Its order of shards to fetch ends there, and is not searched for the bad one."""
    few = f"sources.web.path={server.url}/web/shard-{{00000..00003}}.tar"
    inputs = opened(server.url, few, "budget.steps=3000000")
    grown = Quarantine(first_steps={"web": {"shard-00003.tar": 1}, "chat": {"shard-00000.tar": 1}})
    own = RankRows(rank=0, ranks=1, rows_per_step=8, micro_batch_rows=2)
    begin = time.monotonic()
    loader = open_loader(
        inputs.plan.with_quarantine(grown),
        inputs.sources,
        inputs.shard_store,
        own,
        first=1,
        ahead=2,
    )
    batches = iter(loader)
    assert [next(batches).step for _ in range(200)][-1] == 200
    inputs.shard_store.close()
    loader.close()
    assert time.monotonic() - begin < 10


def test_a_closed_loader_leaves_no_shard_in_use_and_no_rows(data, server, tmp_path):
    inputs = opened(server.url)
    own = RankRows(rank=0, ranks=1, rows_per_step=8, micro_batch_rows=2)
    loader = open_loader(inputs.plan, inputs.sources, inputs.shard_store, own, first=1, ahead=2)
    next(iter(loader))
    inputs.shard_store.close()
    loader.close()
    assert in_use(tmp_path)
    grown, _ = Quarantine().extended([bad("web", "shard-00003.tar")], 1)
    again = open_loader(
        inputs.plan.with_quarantine(grown),
        inputs.sources,
        inputs.shard_store,
        own,
        first=1,
        ahead=2,
    )
    gc.collect()
    batch = next(iter(again))
    expected = with_quarantine(opened(data), grown)
    assert (
        batch.micro_batches[0].ids_BT.tolist()
        == step_batch(expected.plan, own, 1).micro_batches[0].ids_BT.tolist()
    )
    inputs.shard_store.close()
    again.close()


def first_fault(inputs):
    own = RankRows(rank=0, ranks=1, rows_per_step=8, micro_batch_rows=2)
    loader = open_loader(inputs.plan, inputs.sources, inputs.shard_store, own, first=1, ahead=2)
    try:
        with pytest.raises(BigmixError) as caught:
            list(loader)
        return caught.value
    finally:
        inputs.shard_store.close()
        loader.close()


@pytest.mark.parametrize("read", ["whole", "ranges"])
def test_a_server_that_is_gone_makes_no_shard_bad(data, server, read):
    inputs = opened(server.url, f"cache.read={read}")
    server.always = ("status", 503, {})
    fault = first_fault(inputs)
    assert not isinstance(fault, BadShard)
    assert "the whole source is at fault, since its manifest cannot be read either" in str(fault)


def test_a_folder_that_is_gone_makes_no_shard_bad(data):
    inputs = opened(data)
    shutil.rmtree(data)
    fault = first_fault(inputs)
    assert not isinstance(fault, BadShard) and "the whole source is at fault" in str(fault)


@pytest.mark.parametrize("read", ["whole", "ranges"])
def test_a_source_that_is_prepared_again_makes_no_shard_bad(data, server, tmp_path, read):
    inputs = opened(server.url, f"cache.read={read}")
    write_source(tmp_path / "new" / "web", "text", seed=5, shards=20, documents=5)
    serve(server, tmp_path / "new")
    fault = first_fault(inputs)
    assert not isinstance(fault, BadShard)
    assert f"{server.url}/web/manifest.json lists other shards than at the start" in str(fault)


def test_a_full_cache_and_a_closed_store_make_no_shard_bad(data, server, tmp_path):
    inputs = opened(server.url, "cache.size=3000", "cache.ahead_files=1")
    assert isinstance(first_fault(inputs), CacheFull)
    inputs = opened(server.url, cache="other")
    stream = inputs.plan.streams["web"]
    open_loader(
        inputs.plan,
        inputs.sources,
        inputs.shard_store,
        RankRows(rank=0, ranks=1, rows_per_step=8, micro_batch_rows=2),
        first=1,
        ahead=2,
    )
    inputs.shard_store.close()
    with pytest.raises(Stopped):
        for row in stream.in_shard_order():
            stream.read(row)


def test_a_damaged_file_of_the_cache_is_fetched_again_by_the_next_run(data, server, tmp_path):
    assert trained([opened(server.url) for _ in range(2)])[1] == Quarantine()
    manifest = read_source(str(data / "web")).manifest
    cached = tmp_path / "cache" / f"{manifest.shards[3].sha256}.shard"
    flip(cached)
    assert "shard-00003.tar" in str(first_fault(opened(server.url)))
    assert not cached.exists()
    steps, quarantine = trained([opened(server.url) for _ in range(2)])
    assert quarantine == Quarantine() and steps == trained([opened(data) for _ in range(2)])[0]


def test_damaged_local_shards_are_reported_at_the_start_and_do_not_refuse_the_run(data):
    flip(data / "web" / "shard-00003.tar")
    (data / "web" / "shard-00007.tar").unlink()
    (note,) = opened(data, verify=True).notes
    assert note.startswith("sources.web.path: 2 of 20 shards are damaged") and "shard-00003" in note
    with pytest.raises(BadInput) as caught:
        opened(data, "bad_shards=fail", verify=True)
    assert len(caught.value.faults) == 2


def test_a_source_with_no_whole_shard_and_a_damaged_held_out_set_are_refused(data):
    flip(data / "held" / "shard-00001.tar")
    for path in (data / "web").glob("*.tar"):
        path.write_bytes(b"")
    with pytest.raises(BadInput) as caught:
        opened(data, "held_out.other=data/held", verify=True)
    assert len(caught.value.faults) == 21
    assert any("held_out of other" in fault and "sha256" in fault for fault in caught.value.faults)


@pytest.mark.parametrize("where", ["local", "web"])
def test_texts_whose_rows_must_be_counted_from_all_shards_are_refused(data, server, where):
    del server.files["/web/shard-00003.tar"]
    (data / "web" / "shard-00003.tar").unlink()
    with pytest.raises(BadInput) as caught:
        opened({"local": data, "web": server.url}[where], "sources.web.whole_below=20")
    (fault,) = caught.value.faults
    assert "shard-00003.tar" in fault and "or set whole_below=0" in fault


def test_texts_whose_rows_can_be_counted_are_replaced_like_others(data, tmp_path):
    """A damaged token leaves the lengths of documents readable."""
    shutil.copytree(data, tmp_path / "whole")
    flip(data / "web" / "shard-00003.tar")
    steps, quarantine = trained([opened(data, "sources.web.whole_below=20") for _ in range(2)])
    assert set(quarantine.first_steps["web"]) == {"shard-00003.tar"}
    whole = [opened(tmp_path / "whole", "sources.web.whole_below=20") for _ in range(2)]
    assert trained([with_quarantine(inputs, quarantine) for inputs in whole])[0] == steps


def test_the_commands_show_what_is_trained_in_place_of_a_bad_shard(data, capsys):
    (data / "web" / "shard-00003.tar").unlink()
    inputs = opened(data)
    grown = Quarantine(first_steps={"web": {"shard-00003.tar": 1}})
    plan = with_quarantine(inputs, grown).plan
    step = next(k for k in range(1, 61) if plan.substituted(k)["web"])
    assert main(["rows", "recipe.yaml", "--step", str(step), "--ranks", "2"]) == 0
    shown = capsys.readouterr()
    rows = [tuple(line.split()[2:6]) for line in shown.out.splitlines()]
    assert rows == [(r.source, str(r.epoch), str(r.shard), str(r.row)) for r in plan.row_ids(step)]
    assert f"replaced from step {step} on: the shard shard-00003.tar of web" in shown.err
    assert main(["plan", "recipe.yaml", "--gpu", "cpu", "--gpus", "2", "--json"]) == 0
    output = capsys.readouterr()
    tokens = Counter()
    for row in (row for k in range(1, 61) for row in plan.row_ids(k)):
        tokens[row.source] += plan.streams[row.source].read(row).num_tokens
    counted = {name: s["tokens"] for name, s in json.loads(output.out)["sources"].items()}
    assert counted == dict(tokens) and "replaced from step 1 on" in output.err
    for words in (
        ["rows", "recipe.yaml", "--step", str(step)],
        ["plan", "recipe.yaml", "--gpu", "cpu"],
    ):
        assert main([*words[:2], "bad_shards=fail", *words[2:]]) == 2
        assert "shard-00003.tar: the file is missing" in capsys.readouterr().err


def test_rows_are_counted_by_ranges_as_they_are_read(folders):
    """What `bigmix plan` adds up, where shards join on the way and rows change their length."""
    the_plan = plan(folders, BAD, LENGTHS[1])
    for name in SHARES:
        drawn = the_plan.mixture.counts(20 * ROWS)[name]
        counted = row_counts(the_plan, name, drawn)
        own = [(k, row) for k in range(1, 21) for row in the_plan.row_ids(k) if row.source == name]
        # Ranks take a step's rows from a place that changes, so that only their sum is the same.
        tokens = [the_plan.streams_at(k)[name].read(row).num_tokens for k, row in own]
        assert len(counted.tokens_R) == len(own) and int(counted.tokens_R.sum()) == sum(tokens)
