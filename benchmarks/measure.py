"""One measurement in a fresh interpreter: a task and its arguments go in as JSON, a JSON object
comes out last.

python benchmarks/measure.py read '{"name": "bigmix", ...}'
"""

import gc
import importlib
import json
import os
import pickle
import shutil
import sys
import time
import zlib
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import psutil
from corpus import ROW_TOKENS, Batch, Corpus, is_whole, mark_whole, read_corpus

MIB = 1 << 20

CURVE_STEPS = 256  # steps of a rank after a jump


def write(*, name: str, folder: str) -> dict[str, Any]:
    """The corpus in the format of one contestant, unless it is there already."""
    module = importlib.import_module(f"peers.{name}")
    corpus = _part(module, folder)
    own = Path(folder) / name
    if not is_whole(own, corpus.num_tokens):
        shutil.rmtree(own, ignore_errors=True)
        own.mkdir(parents=True)
        module.write(corpus, own)
        mark_whole(own, corpus.num_tokens)
    return {
        "note": module.NOTE,
        "versions": {package: version(package) for package in module.PACKAGES},
        "prepared_tokens": corpus.num_tokens,
    }


def read(*, name: str, folder: str, workers: int, seconds: float, started: float) -> dict[str, Any]:
    """Batches for a while. Without workers `seconds` are of CPU time, with them of wall time."""
    module = importlib.import_module(f"peers.{name}")
    corpus, own = _part(module, folder), Path(folder) / name
    began = time.time()
    reader = module.open_reader(corpus, own, workers=workers, state=None)
    _check(next(reader.batches))
    first_s, with_imports_s = time.time() - began, time.time() - started
    halves = [_iterate(reader.batches, seconds / 2, workers)]
    # An unpickled copy, as from a file: the reader goes on and changes its own.
    state = pickle.dumps(reader.state()) if reader.state and not workers else None
    expected = _fingerprint(next(reader.batches))
    halves.append(_iterate(reader.batches, seconds / 2, workers))
    result = {key: sum(half[key] for half in halves) for key in halves[0]}
    result |= {"first_s": first_s, "with_imports_s": with_imports_s}
    if state is not None:
        result |= _resume(module, corpus, own, state, expected)
    return result


def _resume(module: Any, corpus: Corpus, own: Path, state: bytes, expected: int) -> dict[str, Any]:
    """Seconds from a state to the next batch, and whether it is the one that came; or why it cannot
    go on.
    """
    try:
        began = time.time()
        reader = module.open_reader(corpus, own, workers=0, state=pickle.loads(state))
        batch = next(reader.batches)
    except Exception as error:
        return {"resume_fault": f"{type(error).__name__}: {error}"}
    return {"resume_s": time.time() - began, "resume_exact": _fingerprint(batch) == expected}


def _fingerprint(batch: Batch) -> int:
    return zlib.crc32(np.ascontiguousarray(batch.ids_BT).tobytes())


def _iterate(batches: Any, seconds: float, workers: int) -> dict[str, float]:
    wall_began, cpu_began = time.perf_counter(), _cpu_s()
    tokens, done = 0, False
    while not done:
        tokens += next(batches).num_tokens
        wall_s = time.perf_counter() - wall_began
        done = (wall_s if workers else time.process_time() - cpu_began) > seconds
        done = done or wall_s > 5 * seconds
    return {
        "tokens": tokens,
        "cpu_s": _cpu_s() - cpu_began if workers else time.process_time() - cpu_began,
        "wall_s": time.perf_counter() - wall_began,
    }


def _cpu_s() -> float:
    """CPU time of this process and of the workers that it has."""
    workers = psutil.Process().children(recursive=True)
    times = [worker.cpu_times() for worker in workers if worker.is_running()]
    return time.process_time() + float(sum(t.user + t.system for t in times))


def _check(batch: Batch) -> None:
    """A batch that is no batch would be fast."""
    assert batch.ids_BT.shape[1] == ROW_TOKENS, batch.ids_BT.shape
    assert len(set(batch.ids_BT[0, :100].tolist())) > 50, "ids are not random"
    labels = batch.labels_BT
    assert labels is None or (labels >= 0).any(), "no label"


def _part(module: Any, folder: str) -> Corpus:
    return read_corpus(Path(folder) / "corpus").first(module.PART_TOKENS)


def soak(*, folder: str, minutes: float) -> dict[str, float]:
    """Resident memory of bigmix's loader: at the start, after a minute, at the end."""
    ours = importlib.import_module("ours")
    reader = ours.open_reader(Path(folder) / "bigmix", threaded=True, skip=0)
    next(reader.batches)
    began, tokens = time.monotonic(), 0
    result = {"rss_start_mib": _rss_mib()}
    while (passed := time.monotonic() - began) < 60 * minutes:
        tokens += next(reader.batches).num_tokens
        if passed > 60 and "rss_minute_mib" not in result:
            result["rss_minute_mib"] = _rss_mib()
    return result | {"rss_end_mib": _rss_mib(), "tokens": tokens, "minutes": minutes}


def ranks(*, folder: str, ranks: int) -> dict[str, float]:
    """What a step costs one rank of many, at different places of the run."""
    ours = importlib.import_module("ours")
    began = time.process_time()
    plan = ours.make_plan(Path(folder) / "bigmix", 8 * ranks)
    open_s = time.process_time() - began
    step_of = ours.rank_step(plan, ranks, ranks // 2)
    began = time.process_time()
    step_of(1)
    first_s = time.process_time() - began
    costs = []
    for place in (100, 10_000, 1_000_000):
        began = time.process_time()
        step_of(place)
        jump_s = time.process_time() - began
        began = time.process_time()
        for step in range(place + 1, place + 1 + CURVE_STEPS):
            step_of(step)
        costs.append((jump_s, (time.process_time() - began) / CURVE_STEPS))
    jumps, steps = zip(*costs, strict=True)
    return {
        "ranks": ranks,
        "open_s": open_s,
        "first_s": first_s,
        "jump_s": max(jumps),
        "row_us": 1e6 * sum(steps) / len(steps) / 8,
    }


def shards(*, folder: str, shards: int) -> dict[str, float]:
    """What a source of many shards costs to open and to seek in; RSS is over the
    interpreter's own.
    """
    ours = importlib.import_module("ours")
    ours.write_simulated(Path(folder), shards)
    gc.collect()
    before = _rss_mib()
    began = time.process_time()
    plan = ours.simulated_plan(Path(folder))
    open_s = time.process_time() - began
    began = time.process_time()
    plan.row_ids(123_456)
    seek_s = time.process_time() - began
    return {
        "shards": shards,
        "open_s": open_s,
        "seek_s": seek_s,
        "rss_mib": _rss_mib() - before,
    }


def order(*, folder: str, shards: int, rows: int) -> dict[str, Any]:
    """How well each order of a simulated source is shuffled."""
    compared: dict[str, Any] = importlib.import_module("order").compare(Path(folder), shards, rows)
    return compared


def _rss_mib() -> float:
    return float(psutil.Process().memory_info().rss / MIB)


TASKS: dict[str, Callable[..., dict[str, Any]]] = {
    "write": write,
    "read": read,
    "soak": soak,
    "ranks": ranks,
    "shards": shards,
    "order": order,
}


if __name__ == "__main__":
    found = TASKS[sys.argv[1]](**json.loads(sys.argv[2]))
    print(f"\n{json.dumps(found)}", flush=True)
    # Worker processes and threads of some peers do not end by themselves.
    for child in psutil.Process().children(recursive=True):
        child.kill()
    os._exit(0)
