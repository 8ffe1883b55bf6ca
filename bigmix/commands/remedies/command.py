"""`bigmix average`, which averages the weights of models, and `bigmix self-replay`, which prepares
a model's own texts or answers as a source.
"""

import argparse
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bigmix.commands.arguments import count
from bigmix.commands.prepare.command import fraction_of, report_held_out, report_source
from bigmix.commands.prepare.progress import held_out_folder
from bigmix.errors import DONE, BadInput
from bigmix.terminal import Table, Terminal, quiet_third_party_logs

if TYPE_CHECKING:
    from bigmix.commands.remedies.chat_replay import ChatReplay, ReplayedChats
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
            "a replay source of texts or answers that the model itself generates, where there is no"
            " pretraining data"
        ),
        description=(
            "Sample texts from a model, or its answers to prompts, and prepare them as a source, to"
            " be mixed in with role: replay. A command that was stopped continues when it is run"
            " again."
        ),
    )
    add = parser.add_argument
    add("model", metavar="MODEL", help="folder or hub name of the base model")
    add("--kind", choices=("text", "chat"), default="text", help="default text")
    add("--tokens", type=count, required=True, help="tokens to sample, such as 2M")
    add(
        "--output",
        required=True,
        help="folder of the prepared source; what is sampled goes to OUTPUT.jsonl",
    )
    add(
        "--temperature",
        default="1",
        help=(
            "default 1: what the model has learned; with --kind chat several are used in turn:"
            " 0.7,1"
        ),
    )
    add("--top-p", type=float, default=1.0, help="default 1: no token is left out")
    add("--seed", type=int, default=0, help="default 0")
    add(
        "--batch",
        type=count,
        help="documents at a time (default 64 on a CPU, on a GPU by its memory, at most 256)",
    )
    add(
        "--max-tokens",
        type=count,
        help="most tokens of a text (default 512) or answer (1024); fewer by the model's positions",
    )
    add("--held-out", metavar="FRACTION", help="fraction of the documents for OUTPUT-held-out")
    _add_options_of_kinds(parser)
    parser.set_defaults(func=_self_replay)


def _add_options_of_kinds(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("with --kind text").add_argument
    add(
        "--prompt-tokens",
        type=int,
        help="first tokens of each document that are drawn from the vocabulary (default 0)",
    )
    add = parser.add_argument_group("with --kind chat").add_argument
    add(
        "--prompts",
        metavar="seeds|model|FILE",
        help=(
            "what is asked: prompts that come with bigmix (default), questions that the model"
            " itself writes, or a .jsonl file with prompt or messages"
        ),
    )
    add("--languages", metavar="en,zh", help="of the prompts that come with bigmix (default all)")
    add(
        "--systems",
        type=float,
        metavar="FRACTION",
        help="fraction of the conversations with a system prompt of bigmix (default 0.3)",
    )
    add(
        "--greedy-first",
        action="store_true",
        default=None,
        help="the first answer to each prompt has the likeliest tokens; later ones are sampled",
    )


def _self_replay(known: argparse.Namespace) -> int:
    quiet_third_party_logs()
    if known.kind == "chat":
        return _replay_chats(known)
    # transformers takes seconds to import: `bigmix --help` should not.
    from bigmix.commands.remedies.self_replay import self_replay

    settings = _settings(known)
    terminal = Terminal()
    progress = terminal.counter("documents", "tokens", total=settings.num_tokens)
    try:
        generated = self_replay(settings, progress)
    finally:
        terminal.close()
    _report(terminal, settings, generated)
    return DONE


def _settings(known: argparse.Namespace) -> "SelfReplay":
    from bigmix.commands.remedies.self_replay import Sampling, SelfReplay

    faults = _faults_of_other_kind(known, ("prompts", "languages", "systems", "greedy_first"))
    held_out = fraction_of(known.held_out, faults)
    temperatures = _temperatures(known.temperature, faults)
    if len(temperatures) > 1:
        faults.append(
            f"--temperature is {known.temperature}, must be one number with --kind text; give one"
        )
    if faults:
        raise BadInput(*faults)
    return SelfReplay(
        model=known.model,
        num_tokens=known.tokens,
        output=known.output,
        sampling=Sampling(
            temperature=temperatures[0],
            top_p=known.top_p,
            seed=known.seed,
            max_tokens=known.max_tokens,
            prompt_tokens=known.prompt_tokens or 0,
        ),
        batch_size=known.batch,
        held_out=held_out,
    )


def _faults_of_other_kind(known: argparse.Namespace, options: Sequence[str]) -> list[str]:
    return [
        f"--{name.replace('_', '-')} is given with --kind {known.kind}, which has no use for it;"
        " leave it out, or change --kind"
        for name in options
        if getattr(known, name) is not None
    ]


def _temperatures(text: str, faults: list[str]) -> Sequence[float]:
    """The numbers of --temperature; adds to the faults where it is wrong."""
    try:
        return [float(part) for part in text.split(",")]
    except ValueError:
        faults.append(f"--temperature is {text}, must be a number, or several such as 0.7,1")
        return []


def _report(terminal: Terminal, settings: "SelfReplay", generated: "GeneratedSource") -> None:
    terminal.note(
        f"{generated.num_documents:,} documents sampled from {settings.model}:"
        f" {generated.num_tokens:,} tokens, {generated.num_empty:,} documents empty,"
        f" {generated.num_cut:,} cut at --max-tokens; as text in {settings.output}.jsonl"
    )
    prepared = generated.prepared
    for text in (*prepared.warnings, *generated.notes):
        terminal.warning(text)
    report_source(terminal, settings.output, prepared.manifest, prepared.first_dropped)
    report_held_out(terminal, prepared.held_out)


def _replay_chats(known: argparse.Namespace) -> int:
    from bigmix.commands.remedies.chat_replay import chat_replay

    settings = _chat_settings(known)
    terminal = Terminal()
    progress = terminal.counter("conversations", "tokens", total=settings.num_tokens)
    try:
        replayed = chat_replay(settings, progress)
    finally:
        terminal.close()
    _report_chats(terminal, settings, replayed)
    return DONE


def _chat_settings(known: argparse.Namespace) -> "ChatReplay":
    from bigmix.commands.remedies.chat_replay import BUILT_IN, ChatReplay, ChatSampling
    from bigmix.evaluation.behaviour.prompts import LANGUAGES

    faults = _faults_of_other_kind(known, ("prompt_tokens",))
    held_out = fraction_of(known.held_out, faults)
    temperatures = _temperatures(known.temperature, faults)
    if faults:
        raise BadInput(*faults)
    return ChatReplay(
        model=known.model,
        num_tokens=known.tokens,
        output=known.output,
        sampling=ChatSampling(
            prompts=known.prompts or BUILT_IN,
            languages=known.languages.split(",") if known.languages else LANGUAGES,
            temperatures=temperatures,
            top_p=known.top_p,
            greedy_first=bool(known.greedy_first),
            systems=known.systems,
            seed=known.seed,
            max_tokens=known.max_tokens,
        ),
        batch_size=known.batch,
        held_out=held_out,
    )


def _report_chats(terminal: Terminal, settings: "ChatReplay", replayed: "ReplayedChats") -> None:
    from bigmix.commands.remedies.outcomes import meaning

    num_dropped = replayed.reasons.total()
    rows = [("kept", replayed.num_kept, f"{replayed.num_tokens:,} tokens in the loss")]
    rows += [(name, n, meaning(name)) for name, n in replayed.reasons.most_common()]
    title = f"{replayed.num_kept + num_dropped:,} conversations with {settings.model}"
    terminal.table(Table(title=title, columns=("", "number", ""), rows=rows))
    if num_dropped:
        terminal.note(f"those that are not kept are in {replayed.dropped_file}")
    for text in replayed.notes:
        terminal.warning(text)
    for prepared, output in (
        (replayed.prepared, settings.output),
        (replayed.held_out, str(held_out_folder(Path(settings.output)))),
    ):
        if prepared is not None:
            report_source(terminal, output, prepared.manifest, prepared.first_dropped)
