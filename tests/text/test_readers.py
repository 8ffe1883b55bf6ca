"""Every format gives the same records, and a broken file is an error that names the place."""

import gzip
import io
import json
import tarfile

import datasets
import pyarrow
import pyarrow.parquet
import pytest

from bigmix.errors import BadInput
from bigmix.text import readers
from bigmix.text.readers import ReadOptions, read_records

ROWS = [{"text": "one\n"}, {"text": "zwei 混合"}, {"text": "three"}]
LINES = "".join(json.dumps(row) + "\n" for row in ROWS).encode()


def read(*inputs, **options):
    return list(read_records([str(each) for each in inputs], ReadOptions(**options)))


def columns(*inputs, **options):
    return [record.columns for record in read(*inputs, **options)]


def tar_of(members):
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return buffer.getvalue()


def zstd(content):
    return pyarrow.Codec("zstd").compress(content, asbytes=True)


TAR = tar_of((f"a/{n:03}.json", json.dumps(row).encode()) for n, row in enumerate(ROWS))
FILES = {
    "rows.jsonl": LINES,
    "bom.jsonl": b"\xef\xbb\xbf" + LINES,
    "crlf.jsonl": LINES.replace(b"\n", b"\r\n"),
    "no-end.jsonl": LINES.rstrip(b"\n"),
    "rows.jsonl.gz": gzip.compress(LINES),
    "two-members.jsonl.gz": gzip.compress(LINES[:10]) + gzip.compress(LINES[10:]),
    "rows.jsonl.zst": zstd(LINES),
    "two-frames.jsonl.zst": zstd(LINES[:10]) + zstd(LINES[10:]),
    "array.json": json.dumps(ROWS).encode(),
    "lines.json": LINES,
    "lines.json.gz": gzip.compress(LINES),
    "rows.tar": TAR,
    "rows.tar.gz": gzip.compress(TAR),
    "rows.tgz": gzip.compress(TAR),
    "rows.tar.zst": zstd(TAR),
}


@pytest.mark.parametrize("name", FILES)
def test_each_format_gives_the_same_records(tmp_path, name):
    (tmp_path / name).write_bytes(FILES[name])
    assert columns(tmp_path / name) == ROWS


def test_parquet_saved_datasets_and_hub_names_give_the_same_records(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    table = pyarrow.Table.from_pylist(ROWS)
    (tmp_path / "hub").mkdir()
    pyarrow.parquet.write_table(table, tmp_path / "hub" / "rows.parquet")
    datasets.Dataset.from_list(ROWS).save_to_disk(tmp_path / "saved")
    assert columns(tmp_path / "hub" / "rows.parquet") == ROWS
    assert columns(tmp_path / "saved") == ROWS
    assert columns(f"hf:{tmp_path / 'hub'}") == ROWS
    assert columns(f"hf:{tmp_path / 'hub'}::train") == ROWS


def test_of_a_saved_dataset_with_splits_one_must_be_named(tmp_path):
    datasets.DatasetDict({"train": datasets.Dataset.from_list(ROWS)}).save_to_disk(tmp_path / "d")
    with pytest.raises(BadInput, match="train"):
        read(tmp_path / "d")
    assert columns(tmp_path / "d" / "train") == ROWS


def test_records_know_their_line_and_blank_lines_count(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'{"text":"a"}\n\n  \n{"text":"b"}\n')
    assert [(record.file, record.number) for record in read(path)] == [
        (str(path), 1),
        (str(path), 4),
    ]


def test_folders_and_globs_are_read_in_order_of_their_names(tmp_path):
    for name in ("b.txt", "sub/a.txt", "c.txt", "README.md"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(name)
    assert [row["text"] for row in columns(tmp_path)] == ["b.txt", "c.txt", "sub/a.txt"]
    assert [row["text"] for row in columns(f"{tmp_path}/*.txt")] == ["b.txt", "c.txt"]
    assert [row["text"] for row in columns(tmp_path / "c.txt", tmp_path / "b.txt")] == [
        "c.txt",
        "b.txt",
    ]


@pytest.mark.parametrize("given", ["nothing.jsonl", "none/*.txt", "rows.csv", "empty"])
def test_an_input_that_cannot_be_read_is_refused_with_what_can(tmp_path, given):
    (tmp_path / "rows.csv").write_text("a,b")
    (tmp_path / "empty").mkdir()
    with pytest.raises(BadInput, match=r"\.jsonl"):
        read(tmp_path / given)


@pytest.mark.parametrize("chunk", [1, 2, 3, 7, 1 << 20])
@pytest.mark.parametrize(
    "text", ["", "a", "a--b", "--a----b--", "é混--合-\n", "a-", "a--b\n\nc--d"]
)
def test_a_text_file_is_split_as_its_full_text_would_be(tmp_path, monkeypatch, chunk, text):
    monkeypatch.setattr(readers, "CHUNK", chunk)
    (tmp_path / "t.txt").write_text(text)
    expected = text.split("--")
    if expected[-1] == "":
        expected.pop()
    assert [row["text"] for row in columns(tmp_path / "t.txt", split_on="--")] == expected
    assert [row["text"] for row in columns(tmp_path / "t.txt")] == [text]


@pytest.mark.parametrize("line", [b"{nonsense", b"[1]", b'"text"', b'{"text":"\xff"}', b"\x00"])
def test_a_broken_line_is_an_error_that_names_it_or_a_record_without_columns(tmp_path, line):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'{"text":"a"}\n' + line + b'\n{"text":"b"}\n')
    with pytest.raises(BadInput, match=r"rows\.jsonl, line 2"):
        read(path)
    assert columns(path, skip_bad_lines=True) == [{"text": "a"}, None, {"text": "b"}]


def test_an_element_of_an_array_that_is_no_object_is_an_error_that_names_it(tmp_path):
    path = tmp_path / "rows.json"
    path.write_text('[{"text":"a"}, 3]')
    with pytest.raises(BadInput, match=r"rows\.json, element 2"):
        read(path)
    assert columns(path, skip_bad_lines=True) == [{"text": "a"}, None]


@pytest.mark.parametrize("name", ["rows.jsonl.gz", "rows.jsonl.zst", "rows.tar.gz", "rows.tar.zst"])
def test_a_compressed_file_cut_anywhere_is_an_error_that_names_it(tmp_path, name):
    path, content = tmp_path / name, FILES[name]
    for length in range(1, len(content) - 1, 7):
        path.write_bytes(content[:length])
        with pytest.raises(BadInput, match=name):
            read(path)


def test_a_tar_cut_anywhere_before_its_end_block_is_an_error_that_names_it(tmp_path):
    path = tmp_path / "rows.tar"
    end = len(TAR.rstrip(b"\0")) + 512 - len(TAR.rstrip(b"\0")) % 512
    for length in range(0, end, 64):
        path.write_bytes(TAR[:length])
        with pytest.raises(BadInput, match=r"rows\.tar"):
            read(path)


def test_a_tar_with_a_damaged_header_is_an_error_not_an_early_end(tmp_path):
    path = tmp_path / "rows.tar"
    for header in (0, 1024, 2048):
        content = bytearray(TAR)
        content[header + 3] ^= 1
        path.write_bytes(content)
        with pytest.raises(BadInput, match=r"rows\.tar"):
            read(path)


def test_joined_tars_are_refused_and_not_half_read(tmp_path):
    (tmp_path / "rows.tar").write_bytes(TAR + TAR)
    with pytest.raises(BadInput, match=r"rows\.tar has data after"):
        read(tmp_path / "rows.tar")


def test_a_cut_parquet_file_is_an_error_that_names_it(tmp_path):
    path = tmp_path / "rows.parquet"
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS), path)
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(BadInput, match=r"rows\.parquet"):
        read(path)


def test_members_of_a_tar_with_one_key_are_one_record(tmp_path):
    members = [
        ("1.txt", b"first"),
        ("1.json", b'{"label": 3}'),
        ("1.jpg", b"\xff"),
        ("2.txt", b"2"),
    ]
    (tmp_path / "s.tar").write_bytes(tar_of(members))
    assert columns(tmp_path / "s.tar") == [{"text": "first", "label": 3}, {"text": "2"}]


def test_a_text_file_that_is_not_utf8_is_an_error_that_names_it(tmp_path):
    (tmp_path / "t.txt").write_bytes("größer".encode("latin-1"))
    with pytest.raises(BadInput, match=r"t\.txt is not UTF-8"):
        read(tmp_path / "t.txt")
