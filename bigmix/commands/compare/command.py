"""The command `bigmix compare RUN ... --out report`: what each run kept and learned."""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from bigmix.errors import DONE

if TYPE_CHECKING:
    from bigmix.commands.compare.report import Summary


def add_compare(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add the command to the parser of `bigmix`."""
    parser = subparsers.add_parser(
        "compare",
        help="compare runs: what was kept, lost and learned, as a page, tables and pictures",
        description="Compare finished runs that started from the same base model.",
    )
    parser.add_argument(
        "runs",
        nargs="+",
        type=Path,
        metavar="RUN",
        help=(
            "output folder of a run or of an evaluation, or a folder that holds such folders at any"
            " depth, as that of a sweep"
        ),
    )
    parser.add_argument(
        "--out", type=Path, default=Path("report"), help="folder to write into (default: report)"
    )
    parser.set_defaults(func=_compare)


def _compare(args: argparse.Namespace) -> int:
    # The import brings numpy and jinja2, which no other command should wait for.
    from bigmix.commands.compare.report import compare

    _show(compare(args.runs, args.out))
    return DONE


def _show(summary: "Summary") -> None:
    # As above: the import is for this command alone.
    from bigmix.commands.compare.read import ABSENT
    from bigmix.commands.compare.tables import kept_table, narrow_tables
    from bigmix.terminal import Table, Terminal

    comparison = summary.comparison
    terminal = Terminal()
    terminal.note(f"{comparison.headline} {comparison.detail}".strip())
    for text in comparison.warnings:
        terminal.warning(text)
    if summary.unknown_letters:
        terminal.warning(
            f"no font on this machine has {summary.unknown_letters}: these letters of names are"
            " boxes in the PNGs, though not on the page; install a font that has them, such as Noto"
            " Sans CJK"
        )
    kept = kept_table(comparison)
    for table in ([] if kept is None else [kept]) + narrow_tables(comparison):
        # A terminal has no room for intervals; they are in the files.
        rows = [
            [row.name, *(None if cell.value == ABSENT else cell.brief for cell in row.cells)]
            for row in table.rows
        ]
        terminal.table(Table(title=table.title, columns=["", *table.heads], rows=rows))
    for path in summary.files:
        terminal.note(f"wrote {path}")
    terminal.close()
