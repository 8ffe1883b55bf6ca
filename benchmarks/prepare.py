"""Measures how much of the time of `bigmix prepare` is the tokenizer: a table with each speed and
its limit from the same run.

python benchmarks/prepare.py [--megabytes 8] [--processes 2] [--rounds 2] [--vocab-size 16K]
[--input FILE.jsonl]

The limit is the tokenizer alone: encode_batch_fast over the same strings, already in memory, on as
many processes. For chats the table also has encode_batch, which reports the characters of each
token too. prepare is timed for the input and for four times the input, from the first record (which
includes the start of its processes) and as a complete command (which also includes imports and the
loading of the tokenizer). Without start-up: the cost of the three further inputs, the slope between
the two. Each figure is the best of the rounds, which alternate, so that other work on the machine
affects all of them. "By processor time" is the tokenizer's share of the processor seconds of all
processes, which other work affects less.
"""

import argparse
import json
import multiprocessing
import os
import random
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

os.environ["TOKENIZERS_PARALLELISM"] = "false"

from bigmix.recipe.fields import whole_number
from bigmix.text.chat_template import open_template, render_chat
from bigmix.text.formats import Conversation, Text, document_of, recognise
from bigmix.text.readers import ReadOptions, read_records
from bigmix.text.tokenizer import load_tokenizer, train_tokenizer

BATCH = 256


def words(draw: random.Random) -> list[str]:
    """A vocabulary of made-up words, of which frequent ones are short."""
    letters = "etaoinshrdlucmfwypvbgkjqxz"
    weights = [1 / (k + 1) for k in range(26)]
    return ["".join(draw.choices(letters, weights, k=2 + k // 400)) for k in range(4000)]


def generate(path: Path, kind: str, size: int) -> None:
    """Write JSON lines of texts with about 2,500 characters, or of chats with two answers of about
    300.
    """
    draw = random.Random(0)
    vocabulary = words(draw)
    weights = [1 / (k + 10) for k in range(len(vocabulary))]

    def text(characters: float) -> str:
        count = max(3, int(draw.lognormvariate(0, 0.7) * characters / 5))
        return " ".join(draw.choices(vocabulary, weights, k=count)).capitalize() + "."

    with path.open("w") as file:
        while file.tell() < size:
            record: dict[str, object] = {"text": text(2500)}
            if kind == "chat":
                roles = ("user", "assistant") * 2
                turns = [{"role": r, "content": text(120 if r == "user" else 300)} for r in roles]
                record = {"messages": turns}
            file.write(json.dumps(record) + "\n")


def strings_of(path: Path, tokenizer: Path) -> tuple[str, list[str]]:
    """The kind of a file, and the strings that the tokenizer gets when the file is prepared."""
    records = [dict(record.columns or {}) for record in read_records([str(path)], ReadOptions())]
    layout = recognise(records[:BATCH], kind=None, columns=None)
    loaded = load_tokenizer(str(tokenizer))
    template = open_template(loaded, "plain") if layout.kind == "chat" else None
    strings = []
    for document in (document_of(record, layout) for record in records):
        if isinstance(document, Text):
            strings.append(document.text)
        elif isinstance(document, Conversation) and template is not None:
            strings.append(getattr(render_chat(loaded, template, document), "text", ""))
    return layout.kind, strings


def encode(
    tokenizer: str, strings: Sequence[str], characters: bool, ready: Any, go: Any, ends: Any
) -> None:
    """The limit: the time that one process takes for its strings, sent before the process ends."""
    backend = load_tokenizer(tokenizer).backend
    work = backend.encode_batch if characters else backend.encode_batch_fast
    work(list(strings[:BATCH]), add_special_tokens=False)
    ready.release()
    go.wait()
    began_s = time.process_time()
    for at in range(0, len(strings), BATCH):
        work(strings[at : at + BATCH], add_special_tokens=False)
    ends.put((time.monotonic(), time.process_time() - began_s))  # one clock for all processes


class Cost(NamedTuple):
    """Seconds by the clock, and processor seconds of all processes."""

    wall_s: float
    cpu_s: float


def cost_of_tokenizer(
    tokenizer: Path, strings: Sequence[str], processes: int, *, characters: bool
) -> Cost:
    context = multiprocessing.get_context("spawn")
    ready, go, ends = context.Semaphore(0), context.Event(), context.Queue()
    shares = [strings[k::processes] for k in range(processes)]
    workers = [
        context.Process(target=encode, args=(str(tokenizer), share, characters, ready, go, ends))
        for share in shares
    ]
    for worker in workers:
        worker.start()
    for _ in workers:
        ready.acquire()
    began = time.monotonic()
    go.set()
    found = [ends.get() for _ in workers]
    for worker in workers:
        worker.join()
    return Cost(max(end for end, _ in found) - began, sum(cpu_s for _, cpu_s in found))


WORK = """
import json, os, sys, time
from pathlib import Path
from bigmix.terminal import quiet_third_party_logs
quiet_third_party_logs()
from bigmix.commands.prepare.job import prepare
from bigmix.commands.prepare.job import PrepareSettings

def cpu_s():
    # The server of the workers is a child, and its times include the workers that have ended.
    total = time.process_time()
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = path.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if int(fields[1]) == os.getpid():
            total += sum(map(int, fields[11:15])) / os.sysconf("SC_CLK_TCK")
    return total

given = json.loads(sys.argv[1])
marks = []
if __name__ == "__main__":
    report = lambda *counts: marks.append((time.perf_counter(), cpu_s())) if not marks else None
    made = prepare(PrepareSettings(**given), report)
    (begin_s, begin_cpu_s), end_cpu_s = marks[0], cpu_s()
    records = [time.perf_counter() - begin_s, end_cpu_s - begin_cpu_s]
    print(json.dumps([records, end_cpu_s, made.manifest.tokens]))
"""


class Run(NamedTuple):
    """The cost of the complete command and from the first record to the last shard, the tokens
    written, and the peak MiB of all processes together.
    """

    command: Cost
    records: Cost
    num_tokens: int
    peak_mib: float


def prepare_once(path: Path, output: Path, tokenizer: Path, processes: int) -> Run:
    given = {"inputs": [str(path)], "tokenizer": str(tokenizer), "output": str(output)}
    script = output.with_suffix(".py")
    script.write_text(WORK)
    arguments = json.dumps(given | {"processes": processes})
    began = time.perf_counter()
    process = subprocess.Popen(
        [sys.executable, str(script), arguments], stdout=subprocess.PIPE, start_new_session=True
    )
    peak = [0.0]
    watcher = threading.Thread(target=watch, args=(process, peak))
    watcher.start()
    output_json, _ = process.communicate()
    command_s = time.perf_counter() - began
    watcher.join()
    shutil.rmtree(output)
    records, cpu_s, num_tokens = json.loads(output_json)
    return Run(Cost(command_s, cpu_s), Cost(*records), num_tokens, peak[0])


def watch(process: "subprocess.Popen[bytes]", peak: list[float]) -> None:
    while process.poll() is None:
        peak[0] = max(peak[0], memory_of(process.pid))
        time.sleep(0.2)


def memory_of(session: int) -> float:
    """MiB of anonymous memory of all processes of a session; pages of files do not count, since the
    system can drop them.
    """
    total = 0
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if os.getsid(int(folder.name)) == session:
                lines = (folder / "status").read_text().splitlines()
                total += sum(int(line.split()[1]) for line in lines if line.startswith("RssAnon"))
        except (OSError, ProcessLookupError):
            continue
    return total / 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--megabytes", type=int, default=8)
    parser.add_argument("--processes", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--vocab-size", type=whole_number, default=16_000)
    parser.add_argument("--input", type=Path)
    known = parser.parse_args()
    print(f"{known.processes} processes")
    print(
        f"{'work':<52}{'M tokens/s':>12}{'of the tokenizer':>18}"
        f"{'by processor time':>20}{'MiB, all processes':>20}"
    )
    with tempfile.TemporaryDirectory() as temporary:
        top = Path(temporary)
        for kind in ("text", "chat") if known.input is None else ("input",):
            path = known.input or top / f"{kind}.jsonl"
            if known.input is None:
                generate(path, kind, known.megabytes << 20)
            measure(top, path, known)


def measure(top: Path, path: Path, known: argparse.Namespace) -> None:
    tokenizer = trained(path, known.vocab_size, top / f"{path.stem}-tokenizer")
    kind, strings = strings_of(path, tokenizer)
    four = top / f"{path.stem}-four.jsonl"
    with four.open("wb") as file:
        for _ in range(4):
            file.write(path.read_bytes())
    limits: dict[bool, list[Cost]] = {False: [], True: []}
    runs: dict[Path, list[Run]] = {path: [], four: []}
    for _ in range(known.rounds):
        for characters, found in limits.items():
            if kind == "chat" or not characters:
                found.append(
                    cost_of_tokenizer(tokenizer, strings, known.processes, characters=characters)
                )
        for each, made in runs.items():
            made.append(prepare_once(each, top / "output", tokenizer, known.processes))
    show(kind, limits, runs[path], runs[four])


def trained(path: Path, vocab_size: int, folder: Path) -> Path:
    records = islice(read_records([str(path)], ReadOptions()), 3000)
    sample = (json.dumps(record.columns or {}, ensure_ascii=False) for record in records)
    return train_tokenizer(sample, vocab_size=vocab_size, kind="bpe", folder=folder)


def show(
    kind: str, limits: dict[bool, list[Cost]], one: Sequence[Run], four: Sequence[Run]
) -> None:
    num_tokens = one[0].num_tokens
    mib = [max(run.peak_mib for run in runs) for runs in (one, four)]
    limit = best(limits[False])

    def line(work: str, cost: Cost, num_inputs: int = 1, memory: float | None = None) -> None:
        end = "" if memory is None else f"{memory:>20.0f}"
        shares = [num_inputs * limit.wall_s / cost.wall_s, num_inputs * limit.cpu_s / cost.cpu_s]
        speed = num_inputs * num_tokens / cost.wall_s / 1e6
        print(f"{f'{kind}: {work}':<52}{speed:>12.2f}{shares[0]:>18.0%}{shares[1]:>20.0%}{end}")

    line("tokenizer alone", limit)
    # If it is far from the best, other work was running and the ratios say little.
    line("tokenizer alone, worst round", Cost(*map(max, zip(*limits[False], strict=True))))
    if limits[True]:
        line("tokenizer alone, with characters", best(limits[True]))
    records = [best([run.records for run in runs]) for runs in (one, four)]
    line("prepare, full command", best([run.command for run in one]), 1, mib[0])
    line("prepare, full command, 4 x the input", best([run.command for run in four]), 4, mib[1])
    line("prepare, from the first record", records[0])
    line("prepare, from the first record, 4 x the input", records[1], 4)
    slope = Cost(records[1].wall_s - records[0].wall_s, records[1].cpu_s - records[0].cpu_s)
    line("prepare, without start-up (the slope)", slope, 3)


def best(costs: Sequence[Cost]) -> Cost:
    return Cost(min(cost.wall_s for cost in costs), min(cost.cpu_s for cost in costs))


if __name__ == "__main__":
    main()
