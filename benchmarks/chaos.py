"""Compares runs that meet a fault with runs that do not.

    python benchmarks/chaos.py [--runs 100] [--seed 0] [--faults NAME ...] [--exec]

Each run of a small recipe meets one fault at a random place and is started again until it is done.
Its weights and the rows that it has trained are then compared with those of a run without the
fault. Everything is real: the processes, gloo, ZeRO-3, the files, kill -9. The libraries are
imported once and processes are forked from here; with `--exec` they are new interpreters, which
take ten times as long to start. Ends with 1 if any run is not as it must be.
"""

import argparse
import os
import random
import sys
import tempfile
from collections.abc import Sequence
from itertools import cycle, islice
from pathlib import Path

os.environ |= {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}  # before torch is imported
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from chaos_run import NAMES, OUTPUTS, Bench, Result, can_mount, draw
from fresh import progress
from table import Table

# What a rank imports while it runs, so that a fork has it already.
import bigmix.commands.train_rank
import bigmix.train.run  # noqa: F401

MAX_DRAWS = 4  # a signal may come when its victim has just ended


def run_all(names: Sequence[str], num_runs: int, seed: int, *, executed: bool) -> list[Result]:
    """Let runs meet the faults in turn, each drawn from a seed of its own."""
    with tempfile.TemporaryDirectory(prefix="bigmix-chaos-") as folder:
        bench, results = Bench(Path(folder)), []
        if not can_mount(Path(folder)):
            names = ["file-limit" if name == "disk-full" else name for name in names]
            progress("no small disk can be mounted here: the size of files is limited instead")
        for number, name in enumerate(islice(cycle(names), num_runs)):
            result = _one(bench, name, f"{seed}-{number}", executed=executed)
            results.append(result)
            progress(_line(number, result))
            if result.faults:
                progress(_last_output(Path(folder)))
    return results


def _one(bench: Bench, name: str, seed: str, *, executed: bool) -> Result:
    for number in range(MAX_DRAWS):
        case = draw(name, random.Random(f"{seed}-{number}"), executed=executed)
        result = bench.run(case)
        if result.happened:
            return result
    result.faults.append(f"the fault did not happen in {MAX_DRAWS} draws")
    return result


def _line(number: int, result: Result) -> str:
    case, fault = result.case, result.case.fault
    how = "supervised" if case.way.supervised else "ranks"
    where = (
        f"{how} {case.num_ranks}>{case.num_ranks_after} {case.save} {fault.place} {fault.step} rank"
        f" {fault.rank} to {list(case.victims)}"
    )
    verdict = "; ".join(result.faults) or "ok"
    return (
        f"{number:4d} {fault.name:18s} {where}: {result.ends}, {result.steps_lost} lost,"
        f" {result.seconds:.1f} s: {verdict}"
    )


def _last_output(folder: Path) -> str:
    """The end of what was printed by the last run that is not as it must be."""
    paths = sorted((folder / OUTPUTS).glob("*"))
    return paths[-1].read_text(errors="replace")[-4000:] if paths else ""


def table(results: Sequence[Result], title: str) -> Table:
    """One line for each fault, and one for all of them."""
    names = list(dict.fromkeys(result.case.fault.name for result in results))
    groups = {name: [r for r in results if r.case.fault.name == name] for name in names}
    return Table(
        heading=title,
        columns=(
            "fault",
            "times",
            "survived",
            "identical weights",
            "most steps lost",
            "rows wrong",
            "as it must be",
        ),
        rows=[_row(name, group) for name, group in {**groups, "all": list(results)}.items()],
        notes=[
            (
                "identical weights: bit for bit, with the moments, of those whose number of ranks"
                " did not change and whose rows were not replaced; the others have the same losses"
                " to 1e-5. rows wrong: lost or repeated."
            ),
        ],
    )


def _row(name: str, results: Sequence[Result]) -> Sequence[str]:
    compared = [r.identical for r in results if r.identical is not None]
    return (
        name,
        str(len(results)),
        str(sum(r.survived for r in results)),
        f"{sum(compared)} of {len(compared)}" if compared else "-",
        str(max(r.steps_lost for r in results)),
        str(sum(r.rows_wrong for r in results)),
        str(sum(not r.faults for r in results)),
    )


def main() -> int:
    """Run and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--faults",
        nargs="+",
        choices=NAMES,
        default=NAMES,
        metavar="NAME",
        help=f"of {', '.join(NAMES)}",
    )
    parser.add_argument(
        "--exec", action="store_true", dest="executed", help="start new interpreters"
    )
    arguments = parser.parse_args()
    results = run_all(arguments.faults, arguments.runs, arguments.seed, executed=arguments.executed)
    print(table(results, f"Chaos, {len(results)} runs").text())
    return int(any(result.faults for result in results))


if __name__ == "__main__":
    sys.exit(main())
