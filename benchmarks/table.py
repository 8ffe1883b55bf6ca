"""Results go in, tables come out, aligned for a terminal of 120 columns or as Markdown."""

import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

WIDTH = 120
Result = Mapping[str, Any]


@dataclass(frozen=True, kw_only=True, slots=True)
class Table:
    """A heading, the columns, a row of cells per line, and lines of notes below."""

    heading: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    notes: Sequence[str] = ()

    def text(self) -> str:
        """Aligned: the first column to the left, figures to the right; a row of two cells is a name
        and a reason.
        """
        whole = [row for row in (self.columns, *self.rows) if len(row) == len(self.columns)]
        widths = [max(len(row[at]) for row in whole) for at in range(len(self.columns))]
        widths[0] = max(len(row[0]) for row in (self.columns, *self.rows))
        lines = [
            self.heading,
            "",
            self._line(self.columns, widths),
            "-" * (sum(widths) + 2 * len(widths) - 2),
        ]
        lines += [self._line(row, widths) for row in self.rows]
        for note in self.notes:
            lines += textwrap.wrap(note, WIDTH, subsequent_indent="    ")
        return "\n".join(lines) + "\n"

    def markdown(self) -> str:
        """As a table of GitHub's."""
        head = [
            "| " + " | ".join(self.columns) + " |",
            "| --- |" + " ---: |" * (len(self.columns) - 1),
        ]
        blank = [""] * len(self.columns)
        rows = ["| " + " | ".join([*row, *blank][: len(blank)]) + " |" for row in self.rows]
        return "\n".join(
            [f"**{self.heading}**", "", *head, *rows, "", *(f"- {n}" for n in self.notes), ""]
        )

    def _line(self, row: Sequence[str], widths: Sequence[int]) -> str:
        if len(row) != len(self.columns):
            return textwrap.shorten(f"{row[0]:<{widths[0]}}  {row[1]}", WIDTH, placeholder=" ...")
        cells = [
            f"{row[0]:<{widths[0]}}",
            *(f"{c:>{w}}" for c, w in zip(row[1:], widths[1:], strict=True)),
        ]
        return "  ".join(cells)


def millions(value: float | None) -> str:
    """A count in millions with three figures."""
    return "-" if value is None else f"{value / 1e6:.{1 if value < 99.95e6 else 0}f}M"


def seconds(value: float | None) -> str:
    """A time in the unit that suits it."""
    if value is None:
        return "-"
    if value < 0.0095:
        return f"{value * 1e6:.0f} us" if value < 0.00095 else f"{value * 1e3:.1f} ms"
    return f"{value * 1e3:.0f} ms" if value < 0.95 else f"{value:.1f} s"


def of_contestants(results: Mapping[str, Result]) -> Table:
    """One line a contestant, the limits first, the others by speed."""
    limits_of = [results[name].get("per_cpu_s") for name in ("document_copy", "shuffled_copy")]
    own = results["bigmix"].get("per_cpu_s")
    limits, others = list(results)[:3], list(results)[3:]
    others.sort(key=lambda name: -results[name].get("per_cpu_s", 0.0))
    notes = [
        "Tokens a second in packed batches [8, 2048] from two sources 80/20. `/CPU s`, `ns`: per"
        " second of CPU time, and CPU time per token, in one process; `/wall s`: the same by the"
        " clock; `2w`: as it is meant to be used, with 2 worker processes (bigmix and torchdata: a"
        " thread), CPU time over all processes; `first`: until the first batch, then with"
        " interpreter and imports; `resume`: from a state in the middle to the next batch, ~ where"
        " that is another batch than without the stop; `of limit`: of copying documents in the"
        " order of the file, `of shuffled`: in a random order; `read`: tokens measured."
    ]
    for name in (*limits, *others):
        found = results[name]
        versions = " ".join(f"{package} {v}" for package, v in found.get("versions", {}).items())
        notes.append(f"{name} ({versions}): {found.get('note', 'not measured')}")
        for key, what in (("used_fault", "with workers"), ("resume_fault", "resume")):
            if found.get(key):
                notes.append(f"    {name} {what}: {found[key]}"[:400])
    return Table(
        heading="Loaders",
        columns=(
            "loader",
            "/CPU s",
            "ns",
            "/wall s",
            "2w /wall",
            "2w /CPU",
            "first",
            "+imports",
            "resume",
            "of limit",
            "of shuffled",
            "x bigmix",
            "read",
        ),
        rows=[_contestant(name, results[name], limits_of, own) for name in (*limits, *others)],
        notes=notes,
    )


def _contestant(
    name: str, found: Result, limits: Sequence[float | None], own: float | None
) -> Sequence[str]:
    if "fault" in found:
        return name, found["fault"]
    rate = found["per_cpu_s"]
    return (
        name,
        millions(rate),
        f"{1e9 / rate:.1f}",
        millions(found["per_wall_s"]),
        millions(found.get("used_per_wall_s")),
        millions(found.get("used_per_cpu_s")),
        seconds(found["first_s"]),
        seconds(found["with_imports_s"]),
        _resumed(found),
        *(f"{rate / limit:.1%}" if limit else "-" for limit in limits),
        f"{rate / own:.3f}" if own else "-",
        millions(found["measured_tokens"]),
    )


def _resumed(found: Result) -> str:
    """A tilde where the next batch is not the one that came without the stop."""
    return seconds(found["resume_s"]) + (
        "~" if found["resume_s"] and not found["resume_exact"] else " "
    )


def of_ranks(results: Sequence[Result]) -> Table:
    """The cost of one rank's eight rows while there are more and more ranks."""
    return Table(
        heading="One rank of many, 8 rows a rank and step (CPU time)",
        columns=(
            "ranks",
            "rows a step",
            "us a row",
            "open the plan",
            "first batch",
            "worst jump to a far step",
        ),
        rows=[
            (
                (str(found["ranks"]), found["fault"])
                if "fault" in found
                else (
                    f"{found['ranks']:,}",
                    f"{8 * found['ranks']:,}",
                    f"{found['row_us']:.0f}",
                    seconds(found["open_s"]),
                    seconds(found["first_s"]),
                    seconds(found["jump_s"]),
                )
            )
            for found in results
        ],
        notes=[
            "A jump goes to step 100, 10,000 and 1,000,000; `us a row` is of the 256 steps after"
            " it, with the checksums of what they touch first."
        ],
    )


def of_shards(results: Sequence[Result]) -> Table:
    """The cost of a manifest of more and more shards."""
    return Table(
        heading="One text source of simulated shards of 64M tokens (CPU time)",
        columns=(
            "shards",
            "open the plan",
            "seek to step 123,456",
            "manifest and plan",
        ),
        rows=[
            (
                (f"{found['shards']:,}", found["fault"])
                if "fault" in found
                else (
                    f"{found['shards']:,}",
                    seconds(found["open_s"]),
                    seconds(found["seek_s"]),
                    f"{found['rss_mib']:,.0f} MiB",
                )
            )
            for found in results
        ],
        notes=["Memory is resident memory over that of the interpreter with its imports."],
    )


def of_orders(result: Result) -> Table:
    """How far each order is from a true shuffle."""
    if "fault" in result:
        return Table(heading="Order", columns=("order", "reason"), rows=[("all", result["fault"])])
    return Table(
        heading=f"Order of {result['rows']:,} rows of a source of {result['shards']} shards",
        columns=(
            "order",
            "neighbours of one shard",
            "adjacent in the file",
            "serial correlation",
            "shards a step",
        ),
        rows=[
            (
                (name, found["fault"])
                if "fault" in found
                else (
                    name,
                    f"{found['same_shard']:.2%}",
                    f"{found['adjacent']:.3%}",
                    f"{found['correlation']:+.4f}",
                    f"{found['step_shards']:.1f}",
                )
            )
            for name, found in result["orders"].items()
        ],
        notes=[
            "webdataset: shards shuffled, then a buffer of 1,000; mosaicml: py1e with its default"
            " block of 4M. `shards a step`: different shards among 64 rows one after another."
        ],
    )


def of_memory(result: Result) -> Table:
    """Resident memory of bigmix's loader over time."""
    if "fault" in result:
        return Table(
            heading="Memory", columns=("loader", "reason"), rows=[("bigmix", result["fault"])]
        )
    places = ("rss_start_mib", "rss_minute_mib", "rss_end_mib")
    return Table(
        heading=f"Resident memory of bigmix's loader over {result['minutes']:g} minutes",
        columns=("loader", "after the first batch", "after a minute", "at the end", "tokens read"),
        rows=[
            (
                "bigmix",
                *(f"{result[p]:,.0f} MiB" if p in result else "-" for p in places),
                millions(result["tokens"]),
            )
        ],
        notes=["Pages of mapped shards count as resident while the page cache holds them."],
    )
