"""What is asked of `prepare` goes in, all that is wrong with it comes out."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from bigmix.text.formats import Kind
from bigmix.text.readers import ReadOptions

LARGEST_HELD_OUT = 0.5


@dataclass(frozen=True, kw_only=True, slots=True)
class PrepareSettings:
    """What to prepare and how: `limit` counts rows, `max_tokens` the tokens of a document, `shard_tokens` of a shard.

    `part` = (i, n) does the i-th of n parts, from 1; None does all the work and joins it. `held_out` is the fraction of
    the documents that goes to a source of its own.
    """

    inputs: Sequence[str]
    tokenizer: str
    output: str
    kind: Kind | None = None  # None: what the first rows show
    template: Literal["plain", "tokenizer"] = "plain"
    columns: Mapping[str, str] | None = None  # which column plays which part; None: recognised
    read: ReadOptions = field(default_factory=ReadOptions)
    processes: int = 1
    max_tokens: int | None = None
    shard_tokens: int = 64_000_000
    limit: int | None = None
    part: tuple[int, int] | None = None
    deduplicate: bool = False
    held_out: float = 0.0


def faults_of_settings(settings: PrepareSettings) -> Sequence[str]:
    """Every setting that is not allowed."""
    faults = [
        f"--{name.replace('_', '-')} is {value}, must be at least 1"
        for name in ("processes", "max_tokens", "shard_tokens", "limit")
        if (value := getattr(settings, name)) is not None and value < 1
    ]
    if not 0 <= settings.held_out <= LARGEST_HELD_OUT:
        faults.append(
            f"--held-out is {settings.held_out}, must be above 0 and at most {LARGEST_HELD_OUT}; "
            "give a fraction such as 0.005, or leave it out"
        )
    if Path(settings.output).name in ("", ".."):
        faults.append(
            f"--output is {settings.output}, must be a folder with a name: what is held out goes beside it"
        )
    if settings.read.split_on == "":
        faults.append("--split-on is empty; give the text that stands between documents")
    part, parts = settings.part or (1, 1)
    if not 1 <= part <= parts:
        faults.append(
            f"--part is {part}/{parts}, must be from 1/{parts} to {parts}/{parts}; "
            "give each of these parts to one command"
        )
    if settings.limit is not None and parts > 1:
        faults.append(
            f"--limit is {settings.limit}, must be left out with --part: it counts the rows of all parts; "
            "try a limit without --part"
        )
    return faults
