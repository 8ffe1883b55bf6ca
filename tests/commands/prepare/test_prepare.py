"""A prepared source holds every document in order, counts the dropped ones, and is complete or
absent.
"""

import json
import os
import signal
import subprocess
import sys
import time

import pytest
import tokenizers
import transformers
from support.corpora import generated_texts

from bigmix.commands.main import main
from bigmix.commands.prepare import tokenise
from bigmix.commands.prepare.job import PrepareSettings, prepare
from bigmix.data.shards.location import MANIFEST
from bigmix.data.shards.manifest import read_manifest
from bigmix.data.shards.shard import open_shard
from bigmix.errors import BadInput
from bigmix.text.chat_template import encode_chat, open_template
from bigmix.text.formats import Conversation, Layout
from bigmix.text.readers import RawRecord, ReadOptions
from bigmix.text.tokenizer import fingerprint_of, load_tokenizer

TEXTS = generated_texts(600)
CHATS = [
    {"prompt": question.strip(), "response": answer.strip()}
    for question, answer in zip(generated_texts(300, 1), generated_texts(300, 2), strict=True)
]


def write_rows(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def run(tiny_tokenizer, tmp_path):
    """Prepares rows into a folder of the test."""

    def prepared(rows, output="out", report=lambda *_: None, **settings):
        path = write_rows(tmp_path / "rows.jsonl", rows)
        return prepare(
            PrepareSettings(
                inputs=[str(path)],
                tokenizer=str(tiny_tokenizer),
                output=str(tmp_path / output),
                **settings,
            ),
            report,
        )

    return prepared


def stored(folder):
    """Each document's ids and, for chats, its mask, over all shards."""
    manifest = read_manifest(str(folder))
    for entry in manifest.shards:
        shard = open_shard(folder, entry, manifest.dtype)
        for begin, end in zip(shard.offsets, shard.offsets[1:], strict=False):
            mask = shard.loss_mask(begin, end).tolist() if manifest.kind == "chat" else None
            yield shard.tokens(begin, end).tolist(), mask


def files_of(folder):
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*.tar")}


def test_a_text_becomes_its_ids_and_the_end(run, tmp_path, tiny_tokenizer):
    tokenizer = load_tokenizer(str(tiny_tokenizer))
    manifest = run([{"text": text} for text in TEXTS]).manifest
    expected = [[*ids.tolist(), tokenizer.eos_id] for ids in tokenizer.encode(TEXTS)]
    assert [ids for ids, _ in stored(tmp_path / "out")] == expected
    assert manifest.documents == manifest.read == len(TEXTS)
    assert manifest.tokens == sum(map(len, expected))
    assert manifest.loss_tokens == manifest.tokens - len(TEXTS)
    assert manifest.loss_bytes == sum(len(text.encode()) for text in TEXTS)


def test_a_chat_becomes_what_its_template_makes_of_it(run, tmp_path, tiny_tokenizer):
    tokenizer = load_tokenizer(str(tiny_tokenizer))
    template = open_template(tokenizer, "plain")
    manifest = run(CHATS).manifest
    expected = []
    for row in CHATS:
        turns = [
            {"role": "user", "content": row["prompt"]},
            {"role": "assistant", "content": row["response"]},
        ]
        chat = encode_chat(tokenizer, template, Conversation(messages=turns, tools=None))
        expected.append((chat.ids.tolist(), chat.loss_mask.tolist()))
    assert list(stored(tmp_path / "out")) == expected
    assert manifest.loss_tokens == sum(sum(mask) for _, mask in expected)
    assert manifest.loss_bytes == sum(len(row["response"].encode()) for row in CHATS)
    assert manifest.template.sha256 == template.sha256


@pytest.mark.parametrize("rows", [[{"text": text} for text in TEXTS], CHATS], ids=["text", "chat"])
def test_the_shards_do_not_depend_on_the_number_of_processes(run, tmp_path, monkeypatch, rows):
    monkeypatch.setattr(tokenise, "BATCH_RECORDS", 50)
    one = run(rows, "one", shard_tokens=3000)
    three = run(rows, "three", shard_tokens=3000, processes=3)
    assert len(one.manifest.shards) > 2
    assert files_of(tmp_path / "one") == files_of(tmp_path / "three")
    assert one == three


def test_each_shard_but_the_last_reaches_its_size_and_none_splits_a_document(run, tmp_path):
    manifest = run([{"text": text} for text in TEXTS], shard_tokens=2000).manifest
    longest = max(len(ids) for ids, _ in stored(tmp_path / "out"))
    assert len(manifest.shards) > 2
    assert all(2000 <= shard.tokens < 2000 + longest for shard in manifest.shards[:-1])


def test_every_record_is_written_or_counted_with_the_place_of_the_first(run, tmp_path):
    rows = [
        {"messages": [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"}]},
        {"messages": [{"role": "user", "content": "Q"}]},
        {"messages": [{"role": "user", "content": "Q"}, {"role": "assistant", "content": ""}]},
        {
            "messages": [
                {"role": "user", "content": "Q"},
                {"role": "assistant", "content": "A " * 99},
            ]
        },
        {"messages": [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"}]},
        {"messages": [{"role": "user", "content": "Q"}]},
        {"messages": 3},
    ]
    prepared = run(rows, max_tokens=90, kind="chat")
    manifest = prepared.manifest
    assert manifest.dropped == {
        "bad_row": 1,
        "empty_answer": 1,
        "no_assistant_turn": 2,
        "too_long": 1,
    }
    assert manifest.read == len(rows) == manifest.documents + sum(manifest.dropped.values())
    assert prepared.first_dropped["no_assistant_turn"] == f"{tmp_path / 'rows.jsonl'}:2"
    assert any("no_assistant_turn" in text for text in prepared.warnings)


def test_a_limit_reads_no_more(run):
    assert run([{"text": text} for text in TEXTS], limit=7).manifest.read == 7


def test_the_tokenizer_is_saved_with_the_source(run, tmp_path):
    manifest = run([{"text": "one"}]).manifest
    assert fingerprint_of(str(tmp_path / "out" / "tokenizer")) == manifest.tokenizer.fingerprint


def test_an_output_that_holds_something_is_not_touched(run, tmp_path):
    run([{"text": "one"}])
    before = files_of(tmp_path / "out")
    with pytest.raises(BadInput, match="already holds a prepared source"):
        run([{"text": "two"}])
    assert files_of(tmp_path / "out") == before
    (tmp_path / "empty").mkdir()
    run([{"text": "two"}], "empty")


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([], "no records"),
        ([{"text": "", "x": 1}], "not recognised"),
        ([{"messages": [{"role": "user", "content": "Q"}]}], "none of 1 documents is left"),
    ],
)
def test_an_empty_result_is_refused_and_leaves_nothing(run, tmp_path, rows, message):
    with pytest.raises(BadInput, match=message):
        run(rows)
    assert [path.name for path in tmp_path.iterdir()] == ["rows.jsonl"]


def test_faults_of_the_settings_are_reported_together(run):
    with pytest.raises(BadInput) as caught:
        run([{"text": "one"}], processes=0, max_tokens=0)
    assert len(caught.value.faults) == 2


@pytest.mark.parametrize("processes", [1, 2])
@pytest.mark.parametrize("stop_at", [1, 3])
def test_after_an_interruption_nothing_is_left_and_a_rerun_works(
    run, tmp_path, monkeypatch, processes, stop_at
):
    monkeypatch.setattr(tokenise, "BATCH_RECORDS", 50)
    calls = []

    def interrupt(*counts):
        calls.append(counts)
        if len(calls) == stop_at:
            raise KeyboardInterrupt

    rows = [{"text": text} for text in TEXTS]
    with pytest.raises(KeyboardInterrupt):
        run(rows, report=interrupt, processes=processes)
    assert [path.name for path in tmp_path.iterdir()] == ["rows.jsonl"]
    assert run(rows, processes=processes).manifest.documents == len(rows)


def test_progress_counts_up_to_the_whole(run, monkeypatch):
    monkeypatch.setattr(tokenise, "BATCH_RECORDS", 50)
    seen = []
    manifest = run([{"text": text} for text in TEXTS], report=lambda *c: seen.append(c)).manifest
    assert seen == sorted(seen) and len(seen) == 1 + len(TEXTS) / 50
    assert seen[-1] == (manifest.read, manifest.tokens)


def test_a_broken_line_stops_or_is_counted(run, tmp_path, tiny_tokenizer):
    path = write_rows(tmp_path / "some.jsonl", [{"text": text} for text in TEXTS])
    with path.open("a") as file:
        file.write("{broken\n")
    arguments = ["prepare", str(path), "--tokenizer", str(tiny_tokenizer), "--processes", "1"]
    assert main([*arguments, "--output", str(tmp_path / "a")]) == 2
    assert not (tmp_path / "a").exists()
    assert main([*arguments, "--output", str(tmp_path / "b"), "--skip-bad-lines"]) == 0
    assert read_manifest(str(tmp_path / "b")).dropped == {"bad_line": 1}


def test_the_command_prints_what_it_made(tmp_path, tiny_tokenizer, capsys):
    path = write_rows(tmp_path / "some.jsonl", [{"text": "good", "label": "pos"}] * 3)
    arguments = ["prepare", str(path), "--tokenizer", str(tiny_tokenizer), "--processes", "1"]
    assert main([*arguments, "--output", str(tmp_path / "out")]) == 0
    said = capsys.readouterr().out
    assert "recognised as text from text" in said and "3 of 3" in said
    assert "--columns prompt=text,response=label" in said
    assert main([*arguments, "--output", str(tmp_path / "out")]) == 2
    assert "already holds" in capsys.readouterr().err
    arguments += ["--columns", "prompt=text,response=label", "--output", str(tmp_path / "chat")]
    assert main(arguments) == 0
    assert read_manifest(str(tmp_path / "chat")).kind == "chat"


def test_the_command_trains_a_tokenizer_that_prepare_uses(tmp_path):
    path = write_rows(tmp_path / "some.jsonl", CHATS)
    arguments = ["tokenizer", "train", str(path), "--vocab-size", "400"]
    for kind, place in (("bpe", "."), ("unigram", "tokenizer.model")):
        folder = tmp_path / kind
        assert main([*arguments, "--kind", kind, "--output", str(folder)]) == 0
        given = ["prepare", str(path), "--tokenizer", str(folder / place), "--processes", "1"]
        assert main([*given, "--output", str(tmp_path / f"out-{kind}")]) == 0
        assert read_manifest(str(tmp_path / f"out-{kind}")).documents == len(CHATS)


@pytest.mark.slow
def test_a_killed_command_leaves_no_source_and_no_process(tmp_path, tiny_tokenizer):
    path = write_rows(tmp_path / "many.jsonl", [{"text": text * 20} for text in TEXTS] * 20)
    output = tmp_path / "out"
    command = [sys.executable, "-m", "bigmix.commands", "prepare", str(path)]
    command += ["--tokenizer", str(tiny_tokenizer), "--output", str(output), "--processes", "2"]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, start_new_session=True)
    deadline = time.monotonic() + 60
    while not list(tmp_path.glob("out/*.tar.tmp")) and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (output / MANIFEST).exists()
    while _group_lives(process.pid) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not _group_lives(process.pid)


def _group_lives(group):
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    return True


@pytest.mark.parametrize("processes", [1, 2])
def test_records_are_read_only_a_few_batches_ahead(tiny_tokenizer, processes):
    taken = 0

    def records():
        nonlocal taken
        for index in range(100_000):
            taken += 1
            yield RawRecord(file="f", number=index, columns={"text": "a"})

    job = tokenise.Job(
        tokenizer=load_tokenizer(str(tiny_tokenizer)),
        layout=Layout(kind="text", columns={"text": "text"}),
        template=None,
        max_tokens=None,
    )
    batches = tokenise.in_batches(tokenise.tokenise, job, records(), processes)
    for done in range(1, 6):
        next(batches)
        ahead = tokenise.IN_FLIGHT * processes + 2
        assert taken <= (done + ahead) * tokenise.BATCH_RECORDS
    batches.close()


def test_a_source_next_to_the_output_is_left_alone(run, tmp_path):
    """Its name is the one that held-out documents would get, if there were any."""
    run([{"text": text} for text in TEXTS[:50]], output="x-held-out")
    kept = sorted(path.name for path in (tmp_path / "x-held-out").iterdir())
    with pytest.raises(BadInput):
        run([{"text": " "}], output="x")
    assert sorted(path.name for path in (tmp_path / "x-held-out").iterdir()) == kept
    (tmp_path / "x/parts").mkdir(parents=True)  # as a command that is killed early leaves it
    with pytest.raises(BadInput, match="x-held-out already holds a prepared source"):
        run([{"text": text} for text in TEXTS[:50]], output="x", held_out=0.1)
    assert run([{"text": text} for text in TEXTS[:50]], output="x").manifest.documents == 50
    assert sorted(path.name for path in (tmp_path / "x-held-out").iterdir()) == kept


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--output", "."], "--output is ., must be a folder with a name"),
        (["--output", "rows.jsonl/x"], "cannot be created"),
        (["--output", "out", "--split-on", ""], "--split-on is empty"),
        (["--output", "out", "--columns", "text=a,text=b"], "names a part twice"),
    ],
)
def test_impossible_arguments_are_refused(
    words, said, tmp_path, tiny_tokenizer, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    write_rows(tmp_path / "rows.jsonl", [{"text": "a"}])
    assert main(["prepare", "rows.jsonl", "--tokenizer", str(tiny_tokenizer), *words]) == 2
    assert said in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "mark", "said"),
    [
        ("a.txt", "\\n\\n", ["--split-on '\\\\n\\\\n' splits nothing in 2 text files"]),
        ("a.txt", "\n\n", []),
        ("a.jsonl", "\n\n", ["splits nothing in the inputs, of which none is a text file"]),
    ],
)
def test_a_separator_that_never_occurs_is_a_warning(name, mark, said, tmp_path, tiny_tokenizer):
    if name == "a.txt":
        for file in ("a.txt", "b.txt"):
            (tmp_path / file).write_text("one river\n\nseven towers\n\n")
    else:
        write_rows(tmp_path / name, [{"text": text} for text in TEXTS[:3]])
    places = sorted(str(path) for path in tmp_path.glob("*.*"))
    read = ReadOptions(split_on=mark)
    found = prepare(
        PrepareSettings(
            inputs=places, tokenizer=str(tiny_tokenizer), output=str(tmp_path / "out"), read=read
        ),
        lambda *_: None,
    )
    assert len(found.warnings) == len(said)
    assert all(part in warning for part, warning in zip(said, found.warnings, strict=True))


def test_half_of_a_surrogate_pair_is_left_out_of_a_tokenizer_with_a_warning(tmp_path, capsys):
    rows = [{"text": text} for text in TEXTS] + [{"text": "half \ud83d one"}]
    path = write_rows(tmp_path / "rows.jsonl", rows)
    words = ["tokenizer", "train", str(path), "--vocab-size", "300", "--output"]
    for kind in ("bpe", "unigram"):
        assert main([*words, str(tmp_path / kind), "--kind", kind]) == 0
        assert "1 texts contain half of a surrogate pair" in capsys.readouterr().out


def test_a_tokenizer_that_does_not_know_the_texts_is_a_warning(run, tmp_path, tiny_tokenizer):
    words = {"<unk>": 0, "<|endoftext|>": 1, "the": 2, "river": 3}
    whole = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="<unk>"))
    whole.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    names = {"unk_token": "<unk>", "eos_token": "<|endoftext|>"}
    few = transformers.PreTrainedTokenizerFast(tokenizer_object=whole, **names)
    few.save_pretrained(tmp_path / "few")
    path = write_rows(tmp_path / "rows.jsonl", [{"text": "the river"}, {"text": "混合 the 知识"}])
    settings = {"inputs": [str(path)], "tokenizer": str(tmp_path / "few")}
    found = prepare(PrepareSettings(**settings, output=str(tmp_path / "few-out")))
    assert any(
        "are '<unk>': the text that they replace is lost" in warning for warning in found.warnings
    )
    assert not run([{"text": "混合"}], output="bytes").warnings


def test_the_turns_of_a_long_chat_are_a_lower_bound(tmp_path, tiny_tokenizer, capsys):
    turns = [{"role": ("user", "assistant")[at % 2], "content": "a"} for at in range(100)]
    path = write_rows(tmp_path / "rows.jsonl", [{"messages": turns}])
    words = ["prepare", str(path), "--tokenizer", str(tiny_tokenizer)]
    assert main([*words, "--output", str(tmp_path / "out")]) == 0
    assert "at least 32.0 on average" in capsys.readouterr().out
