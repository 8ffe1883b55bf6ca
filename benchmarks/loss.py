"""Compares bigmix's loss with others, in a table for each size, dtype and fraction of loss tokens.

python benchmarks/loss.py [--sizes 4096x1024x32000] [--dtypes fp32,bf16] [--fractions 1,0.5,0.2]
                          [--only bigmix,naive] [--repeats 3] [--chunks] [--quick]

Each measurement is a fresh process; the implementations take turns. Sizes are tokens x hidden size
x vocabulary. Peers come with `pip install '.[bench]'`; for one that is not installed or fails, the
table has the reason. `contestant.py` defines an implementation, `loss_case.py` its inputs.
"""

import argparse
import json
import tempfile
import textwrap
from collections.abc import Mapping, Sequence
from itertools import product
from pathlib import Path

import fresh
import loss_table
import losses
import torch
from fresh import Result, progress
from loss_case import DTYPES, Case
from table import WIDTH, Table

from bigmix.loss.chunks import LossShape, chunk_tokens, device_bytes, even_slices
from bigmix.loss.fused import logit_dtype

CPU_SIZES = "4096x1024x32000,4096x512x128256"
GPU_SIZES = "8192x4096x128256,16384x4096x128256,65536x4096x128256,16384x896x151936"
QUICK_SIZES = "1024x256x8000"
FACTORS = (0.25, 0.5, 2, 4)
LIMIT_S = 1800


def child(task: str, scratch: Path, /, **arguments: object) -> Result:
    """The result of a task in a fresh interpreter, or {"fault": why there is none}."""
    environment = {
        # So that CPU time is work, not threads that wait for each other.
        "OMP_WAIT_POLICY": "PASSIVE",
        "TORCHINDUCTOR_CACHE_DIR": str(scratch / "inductor"),
        "TORCHINDUCTOR_COMPILE_THREADS": "1",
    }
    return fresh.run("loss_measure.py", task, arguments, limit_s=LIMIT_S, environment=environment)


def measure(
    names: Mapping[str, Mapping[str, object]], case: Case, folder: Path, repeats: int
) -> dict[str, Result]:
    """The results by name; `names` has the arguments of each. They take turns."""
    common = {"case": case.arguments(), "folder": str(folder)}
    fault = child("prepare", folder, **common).get("fault")
    if fault:
        return {name: {"fault": f"no reference: {fault}"} for name in names}
    runs: dict[str, list[Result]] = {name: [] for name in names}
    for repeat, (name, arguments) in product(range(repeats), names.items()):
        if any("fault" in run for run in runs[name]):
            continue
        found = child("contestant", folder, **common, **arguments)
        runs[name].append(found)
        outcome = found.get("fault") or f"{found['peak_mib']:.0f} MiB, {found['both_s']:.2f} s"
        progress(f"{case}: {repeat + 1}/{repeats} {name}: {outcome}")
    return {name: loss_table.summary(found) for name, found in runs.items()}


def compare(case: Case, folder: Path, names: Sequence[str], repeats: int, machine: Result) -> Table:
    """The table of implementations."""
    found = measure({name: {"name": name} for name in names}, case, folder, repeats)
    _keep(folder, str(case), found)
    return loss_table.of_case(case, found, machine)


def compare_chunks(case: Case, folder: Path, repeats: int, machine: Result) -> Table:
    """The table of chunk sizes around the one by the formula."""
    chosen = _chosen_tokens(case)
    dtype = logit_dtype(torch.device(machine["device"]), DTYPES[case.dtype])
    token_bytes = case.vocabulary_size * dtype.itemsize
    neighbours = {max(16, int(chosen * factor) // 16 * 16) for factor in FACTORS}
    sizes = sorted(neighbours | {chosen})
    names = {
        str(tokens): {"name": losses.OURS, "chunk_bytes": tokens * token_bytes} for tokens in sizes
    }
    found = measure(names, case, folder, repeats)
    _keep(folder, f"chunks {case}", found)
    by_tokens = {int(name): result for name, result in found.items()}
    return loss_table.of_chunks(case, by_tokens, chosen, machine)


def _chosen_tokens(case: Case) -> int:
    """Tokens of a chunk by the formula."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = DTYPES[case.dtype]
    shape = LossShape(
        num_tokens=case.num_loss_tokens,
        hidden_size=case.hidden_size,
        vocabulary_size=case.vocabulary_size,
        hidden_bytes=dtype.itemsize,
        logit_bytes=logit_dtype(device, dtype).itemsize,
        device_type=device.type,
        device_bytes=device_bytes(device),
    )
    first = even_slices(case.num_loss_tokens, chunk_tokens(shape))[0]
    return int(first.stop - first.start)


def _keep(folder: Path, name: str, found: Mapping[str, Result]) -> None:
    path = folder / "results.json"
    kept = json.loads(path.read_text()) if path.is_file() else {}
    path.write_text(json.dumps(kept | {name: found}, indent=1) + "\n")


def options(on_gpu: bool) -> argparse.Namespace:
    """The options of the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument

    def parts(text: str) -> list[str]:
        return text.split(",")

    add("--sizes", type=parts, default=parts(GPU_SIZES if on_gpu else CPU_SIZES))
    add("--dtypes", type=parts, default=["bf16"] if on_gpu else list(DTYPES))
    add("--fractions", type=parts, default=["1", "0.5", "0.2"], help="of tokens in the loss")
    add("--only", type=parts, default=list(losses.ALL), help=", ".join(losses.ALL))
    add("--repeats", type=int, default=3, help="processes, of which the least time is shown (3)")
    add(
        "--chunks", action="store_true", help="compare only bigmix's chunk size with its neighbours"
    )
    add("--quick", action="store_true", help="one small size, once")
    add("--folder", type=Path, help="keeps references and results (default: a temporary one)")
    add("--markdown", type=Path, help="also write the tables")
    chosen = parser.parse_args()
    if chosen.quick:
        chosen.sizes, chosen.repeats = parts(QUICK_SIZES), 1
    return chosen


def cases(chosen: argparse.Namespace) -> list[Case]:
    """All cases, in the order of the tables."""
    return [
        Case(
            num_tokens=num_tokens,
            hidden_size=hidden_size,
            vocabulary_size=vocabulary_size,
            dtype=dtype,
            fraction=float(fraction),
        )
        for size, dtype, fraction in product(chosen.sizes, chosen.dtypes, chosen.fractions)
        for num_tokens, hidden_size, vocabulary_size in [map(int, size.split("x"))]
    ]


def main() -> None:
    """Measure and print the tables."""
    on_gpu = torch.cuda.is_available()
    chosen = options(on_gpu)
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as temporary:
        folder = (chosen.folder or Path(temporary)).absolute()
        folder.mkdir(parents=True, exist_ok=True)
        machine = child("machine", folder)
        tables = []
        for case in cases(chosen):
            if chosen.chunks:
                tables.append(compare_chunks(case, folder, chosen.repeats, machine))
            else:
                tables.append(compare(case, folder, chosen.only, chosen.repeats, machine))
            print(tables[-1].text(), flush=True)
    print("\n".join(textwrap.wrap(loss_table.EXPLANATION, WIDTH)))
    if chosen.markdown:
        chosen.markdown.write_text("\n".join(found.markdown() for found in tables))


if __name__ == "__main__":
    main()
