"""`bigmix average BASE TUNED --weight 0.5 --output FOLDER`: models of one shape become their weighted average."""

import argparse
import shlex
from pathlib import Path
from typing import Any

from bigmix.errors import DONE
from bigmix.terminal import Terminal, tame_libraries


def add_average(subparsers: Any) -> None:
    """Add `bigmix average`."""
    parser = subparsers.add_parser(
        "average",
        help="the weights of a base and of what was tuned from it, averaged",
        description="Average models that were tuned from one base, to keep what the base knew (WiSE-FT).",
    )
    add = parser.add_argument
    add("base", metavar="BASE", help="folder or hub name of the base model")
    add("tuned", nargs="+", metavar="TUNED", help="folder or hub name of a model tuned from it")
    add(
        "--weight",
        type=float,
        action="append",
        required=True,
        help="part of TUNED in the average, from 0 to 1; once for each, the base has what is left",
    )
    add("--output", type=Path, required=True, help="folder to write")
    add("--shard-gib", type=float, default=4.0, help="largest file of weights (default 4 GiB)")
    parser.set_defaults(func=_average)


def _average(known: argparse.Namespace) -> int:
    tame_libraries()
    # transformers takes seconds to import: `bigmix --help` should not.
    from bigmix.commands.remedies.average import average, folder_of, members_of

    folders = [folder_of(name) for name in (known.base, *known.tuned)]
    members = members_of(folders, known.weight)
    terminal = Terminal()
    count = terminal.counter("tensors")
    try:
        average(
            members,
            known.output,
            shard_bytes=int(known.shard_gib * 2**30),
            command=_command(known),
            report=count,
        )
    finally:
        terminal.close()
    parts = " + ".join(f"{member.weight:g} {member.folder}" for member in members)
    terminal.note(f"{parts} written to {known.output}")
    return DONE


def _command(known: argparse.Namespace) -> str:
    """The words that make the same average again."""
    weights = [word for weight in known.weight for word in ("--weight", f"{weight:g}")]
    words = [known.base, *known.tuned, *weights, "--output", str(known.output)]
    return shlex.join(["bigmix", "average", *words])
