"""Compares bigmix's loader with others on one generated corpus, next to limits that are measured in
the same run.

python benchmarks/loader.py [--tokens 200M] [--only bigmix,webdataset] [--scale] [--order]
[--minutes 10]

Each figure is the median of fresh processes that take turns. The peers are installed with `pip
install '.[bench]'` and `pip install --no-deps litdata mosaicml-streaming`; for one that is not
installed or fails the table has the reason. `reader.py` says what a contestant is.
"""

import argparse
import json
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import fresh
import table
from corpus import write_corpus
from fresh import Result, progress

from bigmix.recipe.fields import whole_number

LIMITS = ("memcpy", "document_copy", "shuffled_copy")
PEERS = (
    "torchdata",
    "litdata_tokens",
    "litdata_documents",
    "webdataset",
    "grain",
    "energon",
    "mosaicml",
    "datasets",
)
CONTESTANTS = (*LIMITS, "bigmix", *PEERS)
WORKERS = 2
RANKS = (1, 8, 64, 512, 4096)
SHARDS = (1_000, 10_000, 100_000, 1_000_000)
LIMIT_S = 300
ORDER_ROWS = 1_500_000
ORDER_SHARDS = 64


def child(task: str, **arguments: Any) -> Result:
    """The result of a task in a fresh interpreter, or {"fault": why there is none}."""
    return fresh.run(
        "measure.py",
        task,
        arguments,
        limit_s=LIMIT_S + 60 * arguments.get("minutes", 0),
        environment={"HF_DATASETS_DISABLE_PROGRESS_BARS": "1", "LITDATA_LOG_LEVEL": "ERROR"},
    )


def prepare(names: Sequence[str], folder: Path) -> dict[str, Result]:
    """The corpus in every contestant's format."""
    prepared = {}
    for name in names:
        began = time.monotonic()
        prepared[name] = child("write", name=name, folder=str(folder))
        fault = prepared[name].get("fault", "")
        progress(f"prepared {name} in {time.monotonic() - began:.0f} s {fault}")
    return prepared


def compete(
    names: Sequence[str], folder: Path, *, repeats: int, seconds: float
) -> dict[str, Result]:
    """The medians of every contestant; where a run of it fails, the fault is its result."""
    runs: dict[tuple[str, int], list[Result]] = {}
    for repeat in range(repeats):
        for name in names:
            for workers in (0,) if name in LIMITS else (0, WORKERS):
                earlier = runs.setdefault((name, workers), [])
                if any("fault" in run for run in earlier):
                    continue
                found = child(
                    "read",
                    name=name,
                    folder=str(folder),
                    workers=workers,
                    seconds=seconds,
                    started=time.time(),
                )
                earlier.append(found)
                rate = found.get("fault") or f"{found['tokens'] / found['cpu_s'] / 1e6:.1f}M/CPU s"
                progress(f"{repeat + 1}/{repeats} {name}, {workers} workers: {rate}")
    return {name: summary(runs[name, 0], runs.get((name, WORKERS), [])) for name in names}


def summary(alone: Sequence[Result], used: Sequence[Result]) -> Result:
    """One contestant's figures: rates in tokens a second, times in seconds."""
    for run in alone:
        if "fault" in run:
            return {"fault": run["fault"]}

    def middle(runs: Sequence[Result], value: Callable[[Result], float]) -> float | None:
        return median(map(value, runs)) if runs else None

    result: Result = {
        "per_cpu_s": middle(alone, lambda run: run["tokens"] / run["cpu_s"]),
        "per_wall_s": middle(alone, lambda run: run["tokens"] / run["wall_s"]),
        "first_s": middle(alone, lambda run: run["first_s"]),
        "with_imports_s": middle(alone, lambda run: run["with_imports_s"]),
        "measured_tokens": middle(alone, lambda run: run["tokens"]),
        "resume_s": middle([r for r in alone if "resume_s" in r], lambda run: run["resume_s"]),
        "resume_exact": all(run.get("resume_exact", False) for run in alone),
        "resume_fault": next((r["resume_fault"] for r in alone if "resume_fault" in r), None),
    }
    fault = next((run["fault"] for run in used if "fault" in run), None)
    if fault is not None:
        return result | {"used_fault": fault}
    return result | {
        "used_per_wall_s": middle(used, lambda run: run["tokens"] / run["wall_s"]),
        "used_per_cpu_s": middle(used, lambda run: run["tokens"] / run["cpu_s"]),
    }


def compare(folder: Path, options: argparse.Namespace) -> tuple[Result, list[table.Table]]:
    """The table of contestants."""
    names = [name for name in CONTESTANTS if name in options.only or name in (*LIMITS, "bigmix")]
    prepared = prepare(names, folder)
    able = [name for name in names if "fault" not in prepared[name]]
    found = compete(able, folder, repeats=options.repeats, seconds=options.seconds)
    results = {name: prepared[name] | found.get(name, {}) for name in names}
    return results, [table.of_contestants(results)]


def scale(folder: Path) -> tuple[Result, list[table.Table]]:
    """The cost of a step over ranks, and of a manifest over shards."""
    by_ranks = [{"ranks": n} | child("ranks", folder=str(folder), ranks=n) for n in RANKS]
    by_shards = [{"shards": n} | child("shards", folder=str(folder), shards=n) for n in SHARDS]
    return (
        {"ranks": by_ranks, "shards": by_shards},
        [table.of_ranks(by_ranks), table.of_shards(by_shards)],
    )


def options() -> argparse.Namespace:
    """The options of the command."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--tokens", type=whole_number, default=200_000_000, help="of the corpus (200M)")
    add("--folder", type=Path, help="where the corpus stays for the next run (a temporary one)")
    add("--only", type=lambda text: text.split(","), default=list(PEERS), help=", ".join(PEERS))
    add("--repeats", type=int, default=3, help="runs whose median is shown (3)")
    add("--seconds", type=float, default=2.0, help="of CPU time a run (2)")
    add("--minutes", type=float, default=0.0, help="only: memory of our loader over M minutes (10)")
    add("--scale", action="store_true", help="only: cost over simulated ranks and shards")
    add("--order", action="store_true", help="only: how well the order is shuffled")
    add("--json", type=Path, help="also write the figures")
    add("--markdown", type=Path, help="also write the tables")
    return parser.parse_args()


def run(folder: Path, asked: argparse.Namespace) -> tuple[Mapping[str, Any], list[table.Table]]:
    """The figures and tables of everything that the options name."""
    progress(f"corpus of {asked.tokens / 1e6:.0f}M tokens in {folder}")
    write_corpus(folder / "corpus", int(asked.tokens))
    results: Result = {}
    tables: list[table.Table] = []
    if asked.scale or asked.order or asked.minutes:
        prepare(["bigmix"], folder)
    else:
        results["loaders"], tables = compare(folder, asked)
    if asked.scale:
        results["scale"], found = scale(folder)
        tables += found
    if asked.order:
        results["order"] = child("order", folder=str(folder), shards=ORDER_SHARDS, rows=ORDER_ROWS)
        tables.append(table.of_orders(results["order"]))
    if asked.minutes:
        results["memory"] = child("soak", folder=str(folder), minutes=asked.minutes)
        tables.append(table.of_memory(results["memory"]))
    return results, tables


def main() -> None:
    """The command."""
    asked = options()
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as temporary:
        results, tables = run((asked.folder or Path(temporary)).absolute(), asked)
    if asked.json:
        asked.json.write_text(json.dumps(results, indent=1) + "\n")
    if asked.markdown:
        asked.markdown.write_text("\n".join(found.markdown() for found in tables))
    print("\n".join(found.text() for found in tables))


if __name__ == "__main__":
    main()
