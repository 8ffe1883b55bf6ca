"""The rows of a source are the same wherever its shards are, or there is an error with the file."""

import gc
import threading
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from support.corpora import generated_texts, locate, write_source
from support.downloads import downloads, files_of, in_use, log_unforeseen, serve, unforeseen
from support.recipes import with_quarantine
from support.servers import s3_server, web_server

from bigmix.commands.main import main
from bigmix.data import run_plan
from bigmix.data.loader import open_loader
from bigmix.data.packing import PackingOptions
from bigmix.data.quarantine import BadShard, Quarantine
from bigmix.data.records import RankRows
from bigmix.data.shards.cache import CacheFull
from bigmix.data.shards.prefetch import Ahead
from bigmix.data.shards.retry import Changed, Retry
from bigmix.data.source import (
    RemoteReadOptions,
    ShardStore,
    bytes_in_use,
    needed_in_order,
    read_source,
)
from bigmix.data.stream import OPEN_SHARDS
from bigmix.errors import BadInput, BigmixError
from bigmix.recipe import load_recipe
from bigmix.train.inputs import open_inputs

FAST = Retry(tries=4, first_wait_s=0.01, longest_wait_s=0.02, timeout_s=0.3)
PACKING = PackingOptions(row_tokens=32, long_documents="truncate")

KINDS = ("text", "chat")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Sources of each kind with four shards, one with many small shards, and one with many
    blocks.
    """
    top = tmp_path_factory.mktemp("data")
    for seed, kind in enumerate(KINDS):
        write_source(top / kind, kind, seed=seed, shards=4)
    write_source(top / "many", "text", shards=OPEN_SHARDS + 8, documents=3)
    write_source(top / "large", "text", shards=1, lengths=(20_000, 30_000))
    return top


@pytest.fixture
def server(data):
    with web_server() as server:
        serve(server, data)
        yield server


@pytest.fixture(scope="module")
def bucket(data):
    with s3_server("bucket") as system:
        for path in files_of(data):
            with system.open_output_stream(f"bucket/{path.relative_to(data)}") as file:
                file.write(path.read_bytes())
        yield


def store_at(folder, **changes):
    reading = RemoteReadOptions(
        folder=folder / "cache", max_bytes=1 << 30, retry=FAST, ahead=Ahead()
    )
    return ShardStore(replace(reading, **changes))


def stream_of(shard_store, path, packing=PACKING):
    return shard_store.stream("source", read_source(path, FAST), packing, seed=3)


def rows_of(stream, count=None):
    """The first rows of two epochs, in a form to compare."""
    indices = range(2 * stream.rows_per_epoch if count is None else count)
    rows = [stream.read(locate(stream, index)) for index in indices]
    return [(row.id, row.ids_T.tolist(), row.labels_T.tolist(), row.num_tokens) for row in rows]


def bytes_in_ranges(server):
    """The bytes of shards that were requested in ranges."""
    spans = [span for path, span, _ in server.requests if path.endswith(".tar")]
    bounds = [span.removeprefix("bytes=").split("-") for span in spans]
    return sum(int(last) - int(first) + 1 for first, last in bounds)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("where", ["web", "manifest", "s3", "s3 manifest", "pipe", "file"])
def test_the_same_rows_come_from_everywhere(data, server, bucket, tmp_path, kind, where):
    path = {
        "web": f"{server.url}/{kind}",
        "manifest": f"{server.url}/{kind}/manifest.json?key=secret",
        "s3": f"s3://bucket/{kind}",
        "s3 manifest": f"s3://bucket/{kind}/manifest.json",
        "pipe": f"pipe:cat {data}/{kind}/{{}}",
        "file": f"file://{data}/{kind}",
    }[where]
    local = stream_of(store_at(tmp_path), str(data / kind))
    remote = stream_of(store_at(tmp_path), path)
    assert remote.rows_per_epoch == local.rows_per_epoch
    assert rows_of(remote) == rows_of(local)
    assert remote.lost == local.lost and remote.tokens_per_epoch == local.tokens_per_epoch


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("ranges", [False, True])
def test_faults_of_the_server_change_no_row(data, server, tmp_path, kind, ranges):
    server.faults.extend(
        [
            ("status", 500, {}),
            ("truncate", 30),
            ("reset", 100),
            None,
            ("stall", 200),
            ("reset", 0),
            ("truncate", 700),
            ("status", 503, {}),
            None,
            ("reset", 900),
        ]
    )
    remote = stream_of(store_at(tmp_path, ranges=ranges), f"{server.url}/{kind}")
    assert rows_of(remote) == rows_of(stream_of(store_at(tmp_path), str(data / kind)))
    assert not server.faults


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("where", ["local", "web", "pipe"])
def test_a_brace_pattern_selects_shards(data, server, tmp_path, kind, where):
    name = "shard-{00001..00002}.tar"
    path = {
        "local": f"{data}/{kind}/{name}",
        "web": f"{server.url}/{kind}/{name}",
        "pipe": f"pipe:cat {data}/{kind}/{name}",
    }[where]
    whole, some = read_source(str(data / kind)), read_source(path, FAST)
    chosen = whole.manifest.shards[1:3]
    assert list(some.manifest.shards) == chosen
    assert some.manifest.documents == sum(entry.documents for entry in chosen)
    assert some.manifest.tokens == sum(entry.tokens for entry in chosen)
    everything = stream_of(store_at(tmp_path), str(data / kind))
    stream = stream_of(store_at(tmp_path), path)
    for index in range(2):
        count = Counter(row_id.shard for row_id in stream.in_shard_order())[index]
        assert count == Counter(row_id.shard for row_id in everything.in_shard_order())[index + 1]
        found, expected = (
            s.rows(shard, np.arange(count))
            for s, shard in ((stream, index), (everything, index + 1))
        )
        assert b"".join(found.pieces) == b"".join(expected.pieces)
        assert found.lengths_K.tolist() == expected.lengths_K.tolist()
    assert {
        path for path in downloads(server) if "00001" not in path and "00002" not in path
    } == set()


def test_a_pattern_that_names_other_shards_is_refused(data, server):
    with pytest.raises(BadInput, match="1 shards that its manifest does not list, .* shard-00004"):
        read_source(f"{server.url}/text/shard-{{00003..00004}}.tar", FAST)


def test_few_rows_in_ranges_take_few_bytes(data, server, tmp_path):
    size = len(server.files["/large/shard-00000.tar"])
    remote = stream_of(store_at(tmp_path, ranges=True), f"{server.url}/large")
    rows = rows_of(remote, 2)
    assert rows == rows_of(stream_of(store_at(tmp_path), str(data / "large")), 2)
    fetched = bytes_in_ranges(server)
    assert 0 < fetched < 0.4 * size
    assert not (tmp_path / "cache").exists()


def test_the_lengths_of_documents_are_read_in_ranges_without_their_tokens(server, tmp_path):
    remote = stream_of(store_at(tmp_path, ranges=True), f"{server.url}/large")
    assert remote.table(0).rows_R6[:, 4].sum() == remote.manifest.tokens
    assert bytes_in_ranges(server) < 2000


def test_every_block_in_ranges_is_checked(data, server, tmp_path):
    remote = stream_of(store_at(tmp_path, ranges=True), f"{server.url}/large")
    expected = stream_of(store_at(tmp_path), str(data / "large"))
    size = len(server.files["/large/shard-00000.tar"])
    server.broken["/large/shard-00000.tar"] = ("flip", size // 2)
    failed = 0
    for row_id in expected.in_shard_order()[::500]:
        try:
            row = remote.read(row_id)
        except BigmixError as error:
            assert f"{server.url}/large/shard-00000.tar: the block at byte" in str(error)
            failed += 1
        else:
            assert row.ids_T.tolist() == expected.read(row_id).ids_T.tolist()
    assert 0 < failed < len(expected.in_shard_order()[::500])


def test_a_pipe_is_never_read_in_ranges(data, tmp_path):
    shard_store = store_at(tmp_path, ranges=True)
    assert shard_store.is_fetched(read_source(f"pipe:cat {data}/text/{{}}"))
    assert not shard_store.is_fetched(read_source(str(data / "text")))


@pytest.mark.parametrize("kind", KINDS)
def test_a_flipped_byte_is_refused_and_its_address_is_named(server, tmp_path, kind):
    remote = stream_of(store_at(tmp_path), f"{server.url}/{kind}")
    server.broken |= {path: ("flip", 700) for path in server.files if path.endswith(".tar")}
    with pytest.raises(BadShard, match=rf"{server.url}/{kind}/shard-0000\d.tar has sha256"):
        rows_of(remote)


def test_flipped_lengths_are_refused(server, tmp_path):
    source = read_source(f"{server.url}/chat", FAST)
    server.always = ("flip", 200)
    with pytest.raises(Changed, match=r"/chat/lengths\.npy has sha256"):
        store_at(tmp_path).stream("chat", source, PACKING, seed=0)


@pytest.mark.parametrize("ranges", [False, True])
def test_a_shard_that_vanishes_is_a_failure_and_no_bad_input(server, tmp_path, ranges):
    remote = stream_of(store_at(tmp_path, ranges=ranges), f"{server.url}/text")
    del server.files["/text/shard-00002.tar"]
    with pytest.raises(BigmixError, match=r"no file .*/text/shard-00002\.tar") as caught:
        rows_of(remote)
    assert not isinstance(caught.value, BadInput)


def test_a_source_that_is_not_there_is_bad_input(server, tmp_path):
    with pytest.raises(BadInput, match=r"no file .*/none/manifest\.json"):
        read_source(f"{server.url}/none", FAST)


def test_a_cache_with_room_for_the_open_shards_alone_gives_the_right_rows(data, server, tmp_path):
    source = read_source(f"{server.url}/many", FAST)
    room = bytes_in_use([source], Ahead(files=1))
    assert room < sum(entry.bytes for entry in source.manifest.shards)
    remote = store_at(tmp_path, max_bytes=room).stream("source", source, PACKING, seed=3)
    assert rows_of(remote) == rows_of(stream_of(store_at(tmp_path), str(data / "many")))
    assert max(downloads(server).values()) == 2  # two epochs


def test_a_cache_that_is_too_small_is_reported(server, tmp_path):
    source = read_source(f"{server.url}/many", FAST)
    size = max(entry.bytes for entry in source.manifest.shards)
    remote = store_at(tmp_path, max_bytes=10 * size).stream("source", source, PACKING, seed=3)
    with pytest.raises(CacheFull, match=r"raise cache\.size to"):
        rows_of(remote)


def test_a_stream_holds_the_shards_that_it_used_last_and_no_others(server, tmp_path):
    source = read_source(f"{server.url}/many", FAST)
    stream = store_at(tmp_path).stream("source", source, PACKING, seed=3)
    for index in range(len(source.manifest.shards)):
        stream.rows(index, np.array([0]))
    gc.disable()  # a file is given back at once, not when the garbage collector comes by
    try:
        last = {entry.sha256 for entry in source.manifest.shards[-OPEN_SHARDS:]}
        assert {path.stem for path in in_use(tmp_path)} == last
        stream.release()
        assert in_use(tmp_path) == []
    finally:
        gc.enable()


def test_an_open_shard_is_not_evicted_and_stays_readable(data, server, tmp_path):
    source = read_source(f"{server.url}/many", FAST)
    size = max(entry.bytes for entry in source.manifest.shards)
    shard_store = store_at(tmp_path, max_bytes=2 * size)
    shard = shard_store.open(source, 0)
    for index in range(1, 6):
        shard_store.open(source, index)
    (path,) = in_use(tmp_path)
    assert path.stem == source.manifest.shards[0].sha256
    local = shard_store.open(read_source(str(data / "many")), 0)
    path.unlink()
    assert shard.tokens(0, shard.num_tokens).tolist() == local.tokens(0, local.num_tokens).tolist()


def test_texts_that_are_counted_shard_by_shard_leave_no_shard_open(data, server, tmp_path):
    packing = PackingOptions(row_tokens=32, whole_below=20)
    remote = stream_of(store_at(tmp_path), f"{server.url}/many", packing)
    assert in_use(tmp_path) == []
    assert rows_of(remote) == rows_of(stream_of(store_at(tmp_path), str(data / "many"), packing))


RECIPE = """\
model: {{config: {{model_type: llama}}}}
sequence_length: {length}
rows_per_step: 8
sources:
  web: {{path: {at}/web, role: replay, share: [[0, 0.5], [60, 0.25]]}}
  chat: {{path: {at}/chat, role: task, share: 0.75, held_out: {at}/held}}
budget: {{steps: 150}}
train: {{lr: 1e-2, micro_batch_rows: 2}}
deepspeed: ds_configs/cpu.json
output: run
cache: {{folder: cache, timeout_s: 0.3}}
"""


@pytest.fixture(scope="module")
def mixed(tmp_path_factory):
    """Two sources of more shards than a stream holds open, and a held-out one."""
    top = tmp_path_factory.mktemp("mixed")
    write_source(top / "web", "text", shards=70, documents=5)
    write_source(top / "chat", "chat", seed=1, shards=50, documents=6)
    write_source(top / "held", "chat", seed=1, shards=2)
    return top


@pytest.fixture
def remote(mixed, tmp_path, monkeypatch):
    """A server with these sources, in a folder for a run."""
    monkeypatch.chdir(tmp_path)
    with web_server() as server:
        serve(server, mixed)
        yield server


def opened(at, *overrides, length="64", ranks=2):
    Path("recipe.yaml").write_text(RECIPE.format(at=at, length=length))
    return open_inputs(load_recipe("recipe.yaml", overrides), ranks=ranks, verify=False)


def batches(inputs, rank=0, first=1):
    rank_rows = RankRows(rank=rank, ranks=2, rows_per_step=8, micro_batch_rows=2)
    loader = open_loader(
        inputs.plan, inputs.sources, inputs.shard_store, rank_rows, first=first, ahead=2
    )
    try:
        return [
            ([micro_batch.ids_BT.tolist() for micro_batch in batch.micro_batches], batch.tokens)
            for batch in loader
        ]
    finally:
        loader.close()
        inputs.shard_store.close()


def num_shards(inputs):
    return {name: inputs.plan.num_shards(name) for name in inputs.sources}


@pytest.mark.parametrize("rows_together", [32, 1024])
@pytest.mark.parametrize("length", ["64", "[[0, 32], [70, 64]]"])
@pytest.mark.parametrize("first", [pytest.param(1, marks=pytest.mark.slow), 61])
def test_shards_are_fetched_in_the_order_in_which_they_are_opened(
    mixed, remote, monkeypatch, caplog, rows_together, length, first
):
    log_unforeseen(caplog)
    monkeypatch.setattr(run_plan, "ASSEMBLED_ROWS", rows_together)
    inputs = opened(remote.url, "cache.timeout_s=10", length=length)  # a retry is a second download
    assert batches(inputs, first=first) == batches(opened(mixed, length=length), first=first)
    assert unforeseen(caplog) == 0
    assert set(downloads(remote).values()) == {1}


def test_ranks_that_share_a_cache_fetch_each_shard_once(mixed, remote, monkeypatch, caplog):
    log_unforeseen(caplog)
    monkeypatch.setattr(run_plan, "ASSEMBLED_ROWS", 32)
    remote.part_wait_s = 0.002
    ranks = [opened(remote.url, "cache.timeout_s=10") for _ in range(2)]
    found = {}

    def run(rank):
        found[rank] = batches(ranks[rank], rank)

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [found[rank] for rank in range(2)] == [batches(opened(mixed), rank) for rank in range(2)]
    assert unforeseen(caplog) == 0
    assert set(downloads(remote).values()) == {1}


@pytest.mark.parametrize("length", ["64", "[[0, 32], [70, 64]]"])
def test_a_small_cache_fetches_a_shard_once_for_each_time_it_is_opened(
    mixed, remote, monkeypatch, caplog, length
):
    log_unforeseen(caplog)
    monkeypatch.setattr(run_plan, "ASSEMBLED_ROWS", 32)
    sources = [read_source(f"{remote.url}/{name}") for name in ("web", "chat", "held")]
    room = bytes_in_use(sources, Ahead(files=2))
    patient = "cache.timeout_s=10"  # a retry is a second download
    inputs = opened(remote.url, patient, f"cache.size={room}", "cache.ahead_files=2", length=length)
    assert inputs.notes == []
    assert batches(inputs) == batches(opened(mixed, length=length))
    assert unforeseen(caplog) == 0
    rank_rows = RankRows(rank=0, ranks=2, rows_per_step=8, micro_batch_rows=2)
    stages = inputs.plan.gathered(rank_rows, first=1, last=inputs.plan.steps)
    opens = Counter(
        s.location.url(s.manifest.shards[i].file)
        for s, i in needed_in_order(stages, inputs.sources, num_shards(inputs))
    )
    assert all(count <= opens[remote.url + path] for path, count in downloads(remote).items())
    assert 2 <= max(opens.values()) < 10


def test_a_cache_that_may_be_too_small_is_reported_before_the_run(remote):
    (note,) = opened(remote.url, "cache.size=20000").notes
    assert "cache.size is 20,000 bytes" in note and "set cache.size=" in note
    assert opened(remote.url).notes == []


@pytest.mark.parametrize(
    "bad", [{}, {"web": {"shard-00002.tar": 1}, "chat": {"shard-00000.tar": 5}}]
)
def test_the_order_ends_where_all_shards_are_open(mixed, tmp_path, monkeypatch, bad):
    monkeypatch.chdir(tmp_path)
    few = {
        "web": f"{mixed}/web/shard-{{00000..00003}}.tar",
        "chat": f"{mixed}/chat/shard-{{00000..00003}}.tar",
    }
    inputs = opened(mixed, *(f"sources.{name}.path={path}" for name, path in few.items()))
    inputs = with_quarantine(inputs, Quarantine(first_steps=bad))
    rank_rows = RankRows(rank=0, ranks=2, rows_per_step=8, micro_batch_rows=2)
    drawn = []
    (stage,) = inputs.plan.gathered(rank_rows, first=5, last=10**9)
    batches = (drawn.append(0) or places for places in stage)
    order = list(needed_in_order([batches], inputs.sources, num_shards(inputs)))
    assert len(order) == 8 - len(bad) and len(drawn) == 1


def fetching():
    return [thread for thread in threading.enumerate() if thread.name.startswith("fetch-")]


@pytest.mark.parametrize("read", ["whole", "ranges"])
def test_closing_the_store_ends_all_threads_even_where_the_server_sends_nothing(remote, read):
    inputs = opened(remote.url, "cache.tries=1000", f"cache.read={read}")
    remote.always = ("stall", 10)
    rank_rows = RankRows(rank=0, ranks=2, rows_per_step=8, micro_batch_rows=2)
    loader = open_loader(
        inputs.plan, inputs.sources, inputs.shard_store, rank_rows, first=1, ahead=2
    )

    def wait():
        with pytest.raises(BigmixError):
            list(loader)

    waiting = threading.Thread(target=wait)
    waiting.start()
    time.sleep(0.2)
    assert fetching() and waiting.is_alive()
    begin = time.monotonic()
    inputs.shard_store.close()
    loader.close()
    waiting.join()
    assert time.monotonic() - begin < 2
    assert not fetching()


@pytest.fixture(scope="module")
def prepared(tmp_path_factory, tiny_tokenizer):
    """A source with its tokenizer, as `bigmix prepare` makes it."""
    top = tmp_path_factory.mktemp("prepared")
    (top / "texts.txt").write_text("".join(generated_texts(120)))
    words = ["prepare", str(top / "texts.txt"), "--tokenizer", str(tiny_tokenizer)]
    assert main([*words, "--output", str(top / "texts"), "--processes", "1"]) == 0
    (top / "texts.txt").unlink()
    return top


@pytest.mark.parametrize("where", ["web", "pipe"])
def test_a_tokenizer_is_copied_once_and_whole(prepared, remote, tmp_path, where):
    serve(remote, prepared)
    path = {"web": f"{remote.url}/texts", "pipe": f"pipe:cat {prepared}/texts/{{}}"}[where]
    shard_store, source = store_at(tmp_path), read_source(path, FAST)
    folder = shard_store.tokenizer_folder(source)
    local = prepared / "texts" / "tokenizer"
    assert {p.name: p.read_bytes() for p in folder.iterdir()} == {
        p.name: p.read_bytes() for p in local.iterdir()
    }
    before = len(remote.requests)
    assert shard_store.tokenizer_folder(source) == folder and len(remote.requests) == before
    assert [p.name for p in folder.parent.iterdir() if p.is_dir()] == [folder.name]
    assert not shard_store.tokenizer_folder(read_source(f"{remote.url}/web", FAST)).exists()


def test_the_commands_show_remote_sources_as_local_ones(prepared, remote, capsys):
    serve(remote, prepared)

    def shown(at, *words):
        path = f"sources.web.path={at}/texts"
        assert main([*words[:1], "recipe.yaml", path, *words[1:]]) == 0
        return capsys.readouterr().out

    text = RECIPE.replace("sources:", "sources: #")
    lines = [line for line in text.format(at="x", length=64).splitlines() if "chat:" not in line]
    Path("recipe.yaml").write_text("\n".join(lines).replace("role: replay", "role: task"))
    for words in (
        ("preview", "--step", "2", "--plain"),
        ("rows", "--step", "2"),
        ("plan", "--gpu", "cpu", "--json"),
    ):
        assert shown(remote.url, *words) == shown(prepared, *words)
