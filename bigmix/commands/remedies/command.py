"""`bigmix average`, which averages the weights of models, and `bigmix self-replay`, which prepares
a model's own samples as a source.
"""

import argparse
import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bigmix.commands.arguments import count
from bigmix.commands.prepare.command import fraction_of, report_held_out, report_source
from bigmix.errors import DONE, BadInput
from bigmix.terminal import Terminal, quiet_third_party_logs

if TYPE_CHECKING:
    from bigmix.commands.remedies.self_replay import GeneratedSource, SelfReplay


def add_average(subparsers: Any) -> None:
    """Add `bigmix average`."""
    parser = subparsers.add_parser(
        "average",
        help="average the weights of a base and of models that were tuned from it",
        description=(
            "Average models that were tuned from one base, to keep what the base knew (WiSE-FT)."
        ),
    )
    add = parser.add_argument
    add("base", metavar="BASE", help="folder or hub name of the base model")
    add("tuned", nargs="+", metavar="TUNED", help="folder or hub name of a model tuned from it")
    add(
        "--weight",
        type=float,
        action="append",
        required=True,
        help="weight of TUNED in the average, from 0 to 1; once for each, the base has the rest",
    )
    add("--output", type=Path, required=True, help="folder to write")
    add("--shard-gib", type=float, default=4.0, help="largest file of weights (default 4 GiB)")
    parser.set_defaults(func=_average)


def _average(known: argparse.Namespace) -> int:
    quiet_third_party_logs()
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
    """The command line that makes the same average again."""
    weights = [word for weight in known.weight for word in ("--weight", f"{weight:g}")]
    words = [known.base, *known.tuned, *weights, "--output", str(known.output)]
    return shlex.join(["bigmix", "average", *words])


def add_self_replay(subparsers: Any) -> None:
    """Add `bigmix self-replay`."""
    parser = subparsers.add_parser(
        "self-replay",
        help=(
            "a replay source of texts that the model itself generates, where there is no"
            " pretraining data"
        ),
        description=(
            "Sample texts from a model and prepare them as a source, to be mixed in with role:"
            " replay. A command that was stopped continues when it is run again."
        ),
    )
    add = parser.add_argument
    add("model", metavar="MODEL", help="folder or hub name of the base model")
    add("--tokens", type=count, required=True, help="tokens to sample, such as 2M")
    add(
        "--output",
        required=True,
        help="folder of the prepared source; the texts go to OUTPUT.jsonl",
    )
    add("--temperature", type=float, default=1.0, help="default 1: what the model has learned")
    add("--top-p", type=float, default=1.0, help="default 1: no token is left out")
    add("--seed", type=int, default=0, help="default 0")
    add("--batch", type=count, default=32, help="documents at a time (default 32)")
    add(
        "--max-tokens",
        type=count,
        help="most tokens of a document (default 512, or the model's positions)",
    )
    add(
        "--prompt-tokens",
        type=int,
        default=0,
        help="first tokens of each document that are drawn from the vocabulary (default 0)",
    )
    add("--held-out", metavar="FRACTION", help="fraction of the documents for OUTPUT-held-out")
    parser.set_defaults(func=_self_replay)


def _self_replay(known: argparse.Namespace) -> int:
    quiet_third_party_logs()
    # transformers takes seconds to import: `bigmix --help` should not.
    from bigmix.commands.remedies.self_replay import self_replay

    settings = _settings(known)
    terminal = Terminal()
    try:
        generated = self_replay(settings, terminal.counter("documents", "tokens"))
    finally:
        terminal.close()
    _report(terminal, settings, generated)
    return DONE


def _settings(known: argparse.Namespace) -> "SelfReplay":
    from bigmix.commands.remedies.self_replay import Sampling, SelfReplay

    faults: list[str] = []
    held_out = fraction_of(known.held_out, faults)
    if faults:
        raise BadInput(*faults)
    return SelfReplay(
        model=known.model,
        num_tokens=known.tokens,
        output=known.output,
        sampling=Sampling(
            temperature=known.temperature,
            top_p=known.top_p,
            seed=known.seed,
            max_tokens=known.max_tokens,
            prompt_tokens=known.prompt_tokens,
        ),
        batch_size=known.batch,
        held_out=held_out,
    )


def _report(terminal: Terminal, settings: "SelfReplay", generated: "GeneratedSource") -> None:
    terminal.note(
        f"{generated.num_documents:,} documents sampled from {settings.model}:"
        f" {generated.num_tokens:,} tokens, {generated.num_empty:,} documents empty,"
        f" {generated.num_cut:,} cut at --max-tokens; as text in {settings.output}.jsonl"
    )
    prepared = generated.prepared
    for text in prepared.warnings:
        terminal.warning(text)
    report_source(terminal, settings.output, prepared.manifest, prepared.first_dropped)
    report_held_out(terminal, prepared.held_out)
