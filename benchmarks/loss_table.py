"""The tables of the loss benchmark."""

from collections.abc import Mapping, Sequence
from statistics import median
from typing import Any

import losses
from loss_case import Case
from table import Table

Result = dict[str, Any]
_BIG = 1 << 26


def summary(runs: Sequence[Result]) -> Result:
    """One result of several runs: the least times, the median memory, the errors of the first run;
    or the fault of a run that has one.
    """
    fault = next((run for run in runs if "fault" in run), None)
    if fault is not None:
        return dict(fault)
    least = ("both_s", "both_wall_s", "forward_s", "forward_wall_s")
    middle = ("peak_mib", "kept_mib", "forward_peak_mib")
    return (
        runs[0]
        | {key: min(run[key] for run in runs) for key in least}
        | {key: median(run[key] for run in runs) for key in middle}
    )


def of_case(case: Case, found: Mapping[str, Result], machine: Result) -> Table:
    """A line for each implementation, ordered by memory."""
    naive = found.get(losses.NAIVE, {})
    whole = {name: result for name, result in found.items() if "fault" not in result}
    order = sorted(whole, key=lambda name: whole[name]["peak_mib"])
    floor_s = _floor_s(case, machine)
    columns = [
        "implementation",
        "extra MiB",
        "kept MiB",
        "forward s",
        "+backward s",
        "/ naive",
        "MiB / naive",
    ]
    columns += ["dhidden error", "dhead error", "loss error"]
    columns += ["/ floor"] if floor_s else []
    rows = [_row(losses.ALL[name].title, whole[name], naive, floor_s) for name in order]
    rows += [
        (losses.ALL[name].title, result["fault"])
        for name, result in found.items()
        if "fault" in result
    ]
    return Table(
        heading=f"{case} ({machine['name']})",
        columns=(*columns, "what it does"),
        rows=rows,
        notes=[*_against_best(whole), *_notes(case, machine, floor_s)],
    )


def _row(title: str, result: Result, naive: Result, floor_s: float | None) -> Sequence[str]:
    return (
        title,
        f"{result['peak_mib']:,.0f}",
        f"{result['kept_mib']:,.0f}",
        _seconds(result["forward_s"]),
        _seconds(result["both_s"]),
        _ratio(result, naive, "both_s"),
        _ratio(result, naive, "peak_mib"),
        f"{result['hidden_error']:.1e}",
        f"{result['head_error']:.1e}",
        f"{result['loss_error']:.0e}",
        *((f"{result['both_s'] / floor_s:.2f}",) if floor_s else ()),
        result["note"],
    )


def _seconds(value: float) -> str:
    return f"{value:.2f}" if value >= 0.1 else f"{value:.4f}"


def _ratio(result: Result, other: Result, key: str) -> str:
    return f"{result[key] / other[key]:.2f}" if key in other else "-"


def _against_best(whole: Mapping[str, Result]) -> list[str]:
    """bigmix compared with the best of the others."""
    ours = whole.get(losses.OURS)
    others = {name: result for name, result in whole.items() if name != losses.OURS}
    if ours is None or not others:
        return []
    parts = []
    for key, what in (("peak_mib", "memory"), ("both_s", "time")):
        best = min(others, key=lambda name: others[name][key])
        ratio = ours[key] / others[best][key]
        parts.append(f"{what} {ratio:.2f} of the best other's ({losses.ALL[best].title})")
    return [f"bigmix: {', '.join(parts)}."]


def _floor_s(case: Case, machine: Result) -> float | None:
    """The time of the three products at the rate of a large one."""
    if "rate" not in machine or case.dtype != "bf16":
        return None
    return float(
        6 * case.num_loss_tokens * case.hidden_size * case.vocabulary_size / machine["rate"]
    )


def _notes(case: Case, machine: Result, floor_s: float | None) -> list[str]:
    notes = []
    if floor_s:
        rate = machine["rate"] / 1e12
        notes.append(f"Floor: {floor_s:.4f} s for the three products at {rate:.0f} TFLOP/s.")
    if case.hidden_size * max(case.vocabulary_size, case.num_tokens) > _BIG:
        notes.append("Errors are of evenly spaced rows of the gradients.")
    return notes


def of_chunks(case: Case, found: Mapping[int, Result], chosen: int, machine: Result) -> Table:
    """Memory and time by the tokens of a chunk."""
    base = found[chosen]
    rows: list[Sequence[str]] = []
    for tokens, result in sorted(found.items()):
        name = f"{tokens:,}" + (" (the formula's)" if tokens == chosen else "")
        if "fault" in result:
            rows.append((name, result["fault"]))
            continue
        rows.append(
            (
                name,
                f"{result['peak_mib']:,.0f}",
                _seconds(result["both_s"]),
                _ratio(result, base, "peak_mib"),
                _ratio(result, base, "both_s"),
            )
        )
    return Table(
        heading=f"Tokens of a chunk: {case} ({machine['name']})",
        columns=("tokens", "extra MiB", "forward+backward s", "memory / ours", "time / ours"),
        rows=rows,
    )


EXPLANATION = (
    "Extra MiB: peak memory of forward and backward above the inputs, both gradients included;"
    " kept: what is left of it after backward, the two gradients at least. Seconds: CPU time of all"
    " threads, or by the GPU's clock, the least of the runs; forward is without gradients,"
    " +backward is both. Errors: norm of the difference to an fp64 reference over its norm. Only"
    " bigmix gives sums of each source."
)
