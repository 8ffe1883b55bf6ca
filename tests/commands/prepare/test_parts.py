"""Parts, stops, duplicates and held-out documents: each document is written exactly once, whatever
happens on the way.
"""

import json
import os
import resource
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
import webdataset
from support.corpora import generated_texts

from bigmix.commands.main import main
from bigmix.commands.prepare import parts, tokenise
from bigmix.commands.prepare.job import PrepareSettings, prepare
from bigmix.commands.prepare.parts import divide, listing
from bigmix.commands.prepare.progress import PARTS
from bigmix.data.shards.manifest import read_manifest
from bigmix.data.shards.shard import open_shard
from bigmix.errors import BAD_INPUT, FAILED, BadInput
from bigmix.text.readers import LineSpan, RawRecord, ReadOptions, parsed, read_records, read_span
from bigmix.text.tokenizer import train_tokenizer

TEXTS = generated_texts(900, seed=5)
TWICE = [*TEXTS[:500], *TEXTS[200:700], *TEXTS[:500], *TEXTS]  # 900 documents, 2400 rows
CHATS = [
    {"prompt": asked.strip(), "response": answer.strip()}
    for asked, answer in zip(TEXTS, generated_texts(900, seed=6), strict=True)
]
ROWS = {"text": [{"text": text} for text in TWICE], "chat": CHATS + CHATS[100:400]}


@pytest.fixture
def given(tmp_path, tiny_tokenizer):
    """A function that gives the settings to prepare rows, with small shards."""

    def made(rows, output="out", **settings):
        path = tmp_path / "rows.jsonl"
        if not path.exists():
            path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        base = {"inputs": [str(path)], "tokenizer": str(tiny_tokenizer), "shard_tokens": 4000}
        return PrepareSettings(**(base | {"output": str(tmp_path / output)} | settings))

    return made


def merged(settings, count):
    """The folder of a source that is made in parts, the last part first."""
    for part in range(count, 0, -1):
        made = {name: getattr(settings, name) for name in settings.__slots__}
        prepare(PrepareSettings(**made | {"part": (part, count)}))
    assert main(["prepare", "--merge", "--output", settings.output]) == 0
    return settings.output


def documents(folder):
    """Each document's ids and mask, over all shards in order."""
    manifest = read_manifest(str(folder))
    for entry in manifest.shards:
        shard = open_shard(Path(folder), entry, manifest.dtype)
        for begin, end in zip(shard.offsets, shard.offsets[1:], strict=False):
            mask = None
            if manifest.kind == "chat":
                mask = tuple(shard.loss_mask(begin, end).tolist())
            yield tuple(shard.tokens(begin, end).tolist()), mask


def bytes_of(folder):
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.suffix != ".lock"
    }


@pytest.mark.parametrize("kind", ROWS)
@pytest.mark.parametrize("count", [pytest.param(1, marks=pytest.mark.slow), 2, 5])
def test_parts_hold_the_documents_of_one_run_in_the_same_order(given, tmp_path, kind, count):
    one = prepare(given(ROWS[kind])).manifest
    folder = merged(given(ROWS[kind], "parts"), count)
    assert list(documents(folder)) == list(documents(tmp_path / "out"))
    found = read_manifest(folder)
    assert found.model_copy(update={"shards": one.shards, "lengths": one.lengths}) == one
    assert not (tmp_path / "parts" / PARTS).exists()
    urls = sorted(map(str, (tmp_path / "parts").glob("*.tar")))
    blocks = webdataset.WebDataset(urls, shardshuffle=False).decode()
    lengths = [n for block in blocks for n in block["lengths.npy"]]
    assert lengths == [len(ids) for ids, _ in documents(folder)]


@pytest.mark.parametrize("kind", ROWS)
def test_of_identical_documents_the_first_is_kept_whatever_the_number_of_parts(
    given, tmp_path, kind
):
    prepare(given(ROWS[kind]))
    expected = list(dict.fromkeys(documents(tmp_path / "out")))
    for count in (1, 2, 5):
        folder = merged(given(ROWS[kind], f"of-{count}", deduplicate=True), count)
        assert list(documents(folder)) == expected
        found = read_manifest(folder)
        assert found.dropped == {"duplicate": len(ROWS[kind]) - len(expected)}
        assert found.read == len(ROWS[kind])


def test_the_same_documents_are_held_out_in_any_order_and_number_of_parts(given, tmp_path):
    prepare(given(ROWS["text"]))
    everything = Counter(documents(tmp_path / "out"))
    sides = []
    for name, rows, count in (("a", ROWS["text"], 1), ("b", ROWS["text"][::-1], 3)):
        (tmp_path / "rows.jsonl").unlink()
        folder = merged(given(rows, name, held_out=0.2), count)
        learned, apart = Counter(documents(folder)), Counter(documents(f"{folder}-held-out"))
        assert learned + apart == everything
        assert not learned.keys() & apart.keys()
        assert 100 < len(apart) < 260
        found = read_manifest(folder)
        assert found.dropped == {"held_out": apart.total()}
        assert found.read == found.documents + apart.total()
        sides.append((learned, apart))
    assert sides[0] == sides[1]


def test_statistics_count_every_document(given, tmp_path):
    manifest = prepare(given(ROWS["chat"])).manifest
    made, found = list(documents(tmp_path / "out")), manifest.statistics
    lengths, tokens = Counter(), Counter()
    for ids, _ in made:
        lengths[len(ids).bit_length() - 1] += 1
        tokens[len(ids).bit_length() - 1] += len(ids)
    assert {k: n for k, n in enumerate(found.documents_by_length) if n} == lengths
    assert {k: n for k, n in enumerate(found.tokens_by_length) if n} == tokens
    tenths = Counter(min(10 * sum(mask) // len(ids), 9) for ids, mask in made)
    assert {k: n for k, n in enumerate(found.documents_by_loss) if n} == tenths
    assert found.documents_by_turns[2] == len(made)
    texts = [
        f"User: {r['prompt']}\n\nAssistant: {r['response']}<|endoftext|>" for r in ROWS["chat"]
    ]
    assert found.characters == sum(map(len, texts))
    assert found.text_bytes == sum(len(text.encode()) for text in texts)


@pytest.mark.parametrize("processes", [1, 2])
@pytest.mark.parametrize(
    "extra",
    [
        pytest.param({}, id="plain"),
        pytest.param({"deduplicate": True, "held_out": 0.2}, id="apart", marks=pytest.mark.slow),
    ],
)
def test_a_command_that_stops_anywhere_continues_to_the_same_bytes(
    given, tmp_path, monkeypatch, processes, extra
):
    monkeypatch.setattr(tokenise, "BATCH_RECORDS", 60)
    monkeypatch.setattr(parts, "PIECE_BYTES", 20_000)
    prepare(given(ROWS["text"], "whole", **extra))
    again = 0
    for _ in range(100):
        calls, limit = 0, 4 if processes == 1 else 11

        def stop(*_):
            nonlocal calls
            calls += 1
            if calls > limit:  # noqa: B023
                raise KeyboardInterrupt

        try:
            prepare(given(ROWS["text"], processes=processes, **extra), stop)
            break
        except KeyboardInterrupt:
            again += 1
            assert not (tmp_path / "out" / "manifest.json").exists()
            monkeypatch.setattr(tokenise, "BATCH_RECORDS", 60 + 7 * again)
    assert again > 2
    for suffix in ("", "-held-out")[: 1 + bool(extra)]:
        assert bytes_of(tmp_path / f"out{suffix}") == bytes_of(tmp_path / f"whole{suffix}")


def started(tmp_path, tokenizer, output, *more):
    words = [sys.executable, "-m", "bigmix.commands", "prepare", str(tmp_path / "rows.jsonl")]
    words += ["--tokenizer", str(tokenizer), "--output", str(tmp_path / output)]
    words += ["--shard-tokens", "60000", "--processes", "2", "--held-out", "0.1", *more]
    return subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)


@pytest.mark.slow
def test_a_killed_command_continues_to_the_same_bytes(given, tmp_path, tiny_tokenizer):
    given([{"text": text * 20, "n": k} for k, text in enumerate(TWICE * 3)])
    whole = started(tmp_path, tiny_tokenizer, "whole")
    assert whole.wait() == 0
    shards = len(read_manifest(str(tmp_path / "whole")).shards)
    for least in (1, shards // 2):
        process = started(tmp_path, tiny_tokenizer, "out")
        deadline = time.monotonic() + 60
        while len(list(tmp_path.glob("out/shard-*.tar"))) < least and time.monotonic() < deadline:
            time.sleep(0.002)
        os.kill(process.pid, signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
        assert not (tmp_path / "out" / "manifest.json").exists()
    assert started(tmp_path, tiny_tokenizer, "out").wait() == 0
    for suffix in ("", "-held-out"):
        assert bytes_of(tmp_path / f"out{suffix}") == bytes_of(tmp_path / f"whole{suffix}")


@pytest.mark.slow
def test_a_full_disk_is_reported_and_the_same_command_continues(given, tmp_path, tiny_tokenizer):
    given([{"text": text * 20} for text in TWICE])

    def limited():
        resource.setrlimit(resource.RLIMIT_FSIZE, (90_000, 90_000))

    words = [sys.executable, "-m", "bigmix.commands", "prepare", str(tmp_path / "rows.jsonl")]
    words += ["--tokenizer", str(tiny_tokenizer), "--output", str(tmp_path / "out")]
    words += ["--shard-tokens", "60000", "--processes", "1"]
    found = subprocess.run(words, preexec_fn=limited, capture_output=True, text=True, check=False)
    assert found.returncode == FAILED
    assert "make room and run the same command again" in found.stderr
    assert not list(tmp_path.glob("out/*.tmp"))
    assert main(words[3:]) == 0


def stopped(settings, calls):
    """Run until some batches are done."""
    seen = []

    def stop(*counts):
        seen.append(counts)
        if len(seen) > calls:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        prepare(settings, stop)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"shard_tokens": 5000}, "shard-tokens is 5000"),
        ({"max_tokens": 70}, "max-tokens is 70"),
        ({"columns": {"prompt": "response", "response": "prompt"}}, "columns is"),
        ({"template": "tokenizer"}, "template is"),
        ({"deduplicate": True}, "deduplicate is yes"),
        ({"held_out": 0.1}, "held-out is 0.1"),
        ({"part": (1, 2)}, "another number of parts"),
    ],
)
def test_work_continues_only_with_the_settings_that_began_it(
    given, tmp_path, tiny_tokenizer, change, named
):
    from transformers import AutoTokenizer

    whole = AutoTokenizer.from_pretrained(tiny_tokenizer)
    whole.chat_template = "{% for m in messages %}{{ m.role + m.content + eos_token }}{% endfor %}"
    whole.save_pretrained(tmp_path / "templated")
    tokenizer = {"tokenizer": str(tmp_path / "templated")}
    stopped(given(ROWS["chat"], **tokenizer), 3)
    before = bytes_of(tmp_path / "out")
    with pytest.raises(BadInput, match=named):
        prepare(given(ROWS["chat"], **tokenizer | change))
    assert bytes_of(tmp_path / "out") == before
    assert prepare(given(ROWS["chat"], **tokenizer)).manifest.documents == len(ROWS["chat"])


def test_another_tokenizer_or_other_inputs_are_refused_together(given, tmp_path):
    stopped(given(ROWS["chat"]), 3)
    other = train_tokenizer(TEXTS, vocab_size=420, kind="bpe", folder=tmp_path / "other")
    os.utime(tmp_path / "rows.jsonl", (1, 1))
    with pytest.raises(BadInput) as caught:
        prepare(given(ROWS["chat"], tokenizer=str(other)))
    assert [fault.split()[0] for fault in caught.value.faults] == ["inputs", "tokenizer"]


def test_a_part_is_prepared_by_one_command_at_a_time(given, tmp_path):
    said = []

    def again(*_):
        with pytest.raises(BadInput) as caught:
            prepare(given(ROWS["text"]))
        said.append(caught.value.faults[0])

    prepare(given(ROWS["text"]), again)
    assert "is being prepared by another command" in said[0]


def test_a_folder_with_anything_else_in_it_is_left_alone(given, tmp_path):
    (tmp_path / "out" / PARTS).mkdir(parents=True)
    (tmp_path / "out" / "mine.txt").write_text("mine")
    with pytest.raises(BadInput, match="is not empty"):
        prepare(given(ROWS["text"]))
    assert (tmp_path / "out" / "mine.txt").read_text() == "mine"


def test_shards_that_a_killed_command_did_not_record_are_removed(given, tmp_path):
    prepare(given(ROWS["text"], part=(1, 2)))
    (tmp_path / "out" / "shard-000000.tar").write_bytes(b"")
    (tmp_path / "out" / "shard-00002-000007.tar.tmp").write_bytes(b"")
    folder = merged(given(ROWS["text"]), 2)
    listed = {entry.file for entry in read_manifest(folder).shards}
    assert {path.name for path in (tmp_path / "out").glob("shard-*")} == listed


def test_merging_names_what_is_missing_and_what_does_not_belong_together(given, tmp_path, capsys):
    for part, tokens in ((1, 4000), (3, 5000)):
        prepare(given(ROWS["text"], part=(part, 4), shard_tokens=tokens))
    words = ["prepare", "--merge", "--output", str(tmp_path / "out")]
    assert main(words) == BAD_INPUT
    said = capsys.readouterr().err
    assert "part 2/4 is missing" in said and "part 4/4 is missing" in said
    for part in (2, 4):
        prepare(given(ROWS["text"], part=(part, 4)))
    assert main(words) == BAD_INPUT
    assert "shard-tokens of part 1/4 is 4000, that of part 3/4 is 5000" in capsys.readouterr().err
    assert not (tmp_path / "out" / "manifest.json").exists()


def test_all_faults_of_the_arguments_are_reported_at_once(tmp_path, capsys):
    words = ["prepare", "--part", "5/3", "--held-out", "0.7", "--output", str(tmp_path / "out")]
    assert main(words) == BAD_INPUT
    said = capsys.readouterr().err
    for part in ("no INPUT", "--tokenizer is missing", "--part is 5/3", "--held-out is 0.7"):
        assert part in said
    assert main(["prepare", "x", "--part", "a", "--output", "o"]) == BAD_INPUT
    assert "--part is 'a'" in capsys.readouterr().err


def test_a_report_is_drawn_of_an_existing_source(given, tmp_path, capsys):
    for kind in ROWS:
        (tmp_path / "rows.jsonl").unlink(missing_ok=True)
        prepare(given(ROWS[kind], kind))
        assert main(["prepare", "--report", "--output", str(tmp_path / kind)]) == 0
        assert (tmp_path / kind / "report.png").read_bytes().startswith(b"\x89PNG")
        assert "tokens of a document" in capsys.readouterr().out


def inputs_of(folder):
    """One input of each format, long and short ones."""
    rows = [{"text": text} for text in TEXTS]
    lines = [json.dumps(row) + "\n" for row in rows]
    (folder / "a.jsonl").write_text("\n".join(lines[:400]))
    for k in range(5):
        (folder / f"b{k}.jsonl").write_text("".join(lines[400 + k : 402 + k]))
    table = pyarrow.Table.from_pylist(rows)
    pyarrow.parquet.write_table(table, folder / "c.parquet", row_group_size=37)
    (folder / "d.txt").write_text("|".join(TEXTS))
    (folder / "e.json").write_text(json.dumps(rows))
    import datasets

    datasets.Dataset.from_list(rows).save_to_disk(str(folder / "f"))
    return [str(folder / name) for name in ("a.jsonl", "b*", "c.parquet", "d.txt", "e.json", "f")]


@pytest.mark.parametrize("count", [1, 2, 3, 7, 40])
def test_each_record_of_each_format_belongs_to_one_part(tmp_path, count):
    inputs, options = inputs_of(tmp_path), ReadOptions(split_on="|")
    everything = Counter(str(row.columns) for row in read_records(inputs, options))
    shares = divide(listing(inputs), count)
    found = [
        str(parsed(row, options).columns)
        for share in shares
        for piece in share
        for span in piece
        for row in read_span(span, options)
    ]
    assert len(shares) == count
    assert Counter(found) == everything


def test_parts_of_one_long_file_are_of_the_same_size(tmp_path):
    path = tmp_path / "long.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS * 4))
    for count in (2, 3, 8):
        shares = divide(listing([str(path)]), count)
        sizes = [sum(s.stop - s.start for piece in share for s in piece) for share in shares]
        assert sum(sizes) == path.stat().st_size
        assert max(sizes) < 1.15 * path.stat().st_size / count


def test_a_span_names_the_byte_from_which_its_lines_are_counted(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"a": 1}\n{"a": 2}\n{"a": 3}\n')
    span = LineSpan(place=str(path), start=9, stop=18)
    (row,) = [parsed(row, ReadOptions()) for row in read_span(span, ReadOptions())]
    assert row == RawRecord(file=f"{path} from byte 9", number=1, columns={"a": 2})
