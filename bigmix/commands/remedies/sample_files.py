"""The files that samples are written to, one a line, so that a command that was stopped goes on
where it was; and the order in which they are written.

Samples are numbered, and each depends on its number alone, but they end in another order.
"""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Generic, TypeVar

from bigmix.errors import BadInput
from bigmix.files import replace_text

SampleT = TypeVar("SampleT")


def keep_settings(files: Sequence[Path], now: Mapping[str, Any]) -> None:
    """Write what the lines of these files depend on next to the first of them; raises BadInput
    where there are lines of other settings.
    """
    path = settings_file(files[0])
    begun = [file for file in files if file.exists()]
    if begun and not path.exists():
        raise BadInput(
            f"{begun[0]} exists and was not made by this command; remove it, or give another"
            " --output"
        )
    if begun:
        then, names = kept_settings(files[0]), " and ".join(map(str, begun))
        faults = [
            f"{key} is {now.get(key)!r}, and {begun[0]} was begun with {then.get(key)!r}; give"
            f" that again, or remove {names}"
            for key in dict.fromkeys([*now, *then])
            if then.get(key) != now.get(key)
        ]
        if faults:
            raise BadInput(*faults)
    path.parent.mkdir(parents=True, exist_ok=True)
    replace_text(path, json.dumps(now, indent=1) + "\n")


def kept_settings(lines_file: Path) -> Mapping[str, Any]:
    """The settings that were kept for the lines of a file; empty where there are none."""
    path = settings_file(lines_file)
    if not path.exists():
        return {}
    settings: Mapping[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return settings


def settings_file(lines_file: Path) -> Path:
    """Where the settings of the lines of a file are kept."""
    return lines_file.with_suffix(".settings.json")


def complete_lines(path: Path) -> Sequence[Mapping[str, Any]]:
    """The lines that were written before; an incomplete one at the end is removed."""
    if not path.exists():
        return []
    lines = path.read_bytes().splitlines(keepends=True)
    complete = [line for line in lines if line.endswith(b"\n")]
    keep_lines(path, len(complete))
    return [json.loads(line) for line in complete]


def keep_lines(path: Path, num_lines: int) -> None:
    """Remove all but the first lines of a file; one that does not exist has none."""
    if not path.exists():
        return
    with path.open("rb+") as file:
        for _ in range(num_lines):
            file.readline()
        file.truncate(file.tell())


def line_of(value: Mapping[str, Any]) -> str:
    """The value as one line of a file."""
    return json.dumps(value, ensure_ascii=False) + "\n"


Report = Callable[[int, int], None]  # samples and tokens so far


class SampleOrder(Generic[SampleT]):
    """Puts samples into the order of their numbers, and decides whether one more is to be begun.

    `first` is the number of the next sample, `needed` how many tokens there are to be after it.
    `report` is called with the samples and their tokens that have ended since, also with those that
    wait for an earlier one.
    """

    def __init__(self, first: int, needed: int, report: Report) -> None:
        self._next = self._begun = first
        self._num_ended = 0
        self._num_kept = 0
        self._new_tokens = 0
        self._needed = needed
        self._report = report
        self._waiting: dict[int, SampleT] = {}

    def begin(self) -> int | None:
        """The number of a sample that is to be begun; None where those that are begun are probably
        enough.
        """
        num_open = self._begun - self._next - len(self._waiting)
        expected = num_open * self._new_tokens / max(self._num_ended, 1)
        if self._new_tokens + expected >= self._needed:
            return None
        self._begun += 1
        return self._begun - 1

    def end(self, number: int, sample: SampleT, num_tokens: int | None) -> Iterator[SampleT]:
        """Take a sample that has ended, None tokens where it is not kept; yields those that no
        earlier one is missing for.
        """
        self._waiting[number] = sample
        self._num_ended += 1
        if num_tokens is not None:
            self._num_kept += 1
            self._new_tokens += num_tokens
        self._report(self._num_kept, self._new_tokens)
        while self._next in self._waiting:
            self._next += 1
            yield self._waiting.pop(self._next - 1)

    def leave_out(self, num_tokens: int) -> None:
        """Take back a sample with these tokens, which is not kept after all."""
        self._num_kept -= 1
        self._new_tokens -= num_tokens
