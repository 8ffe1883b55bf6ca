"""Shards that were found bad go in, the list of those whose rows are replaced comes out, with the step that each is replaced from."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from bigmix.errors import BigmixError


class BadShard(BigmixError):
    """A shard of a source that cannot be read, by a fault of its own and not of this machine; `shard` is its index."""

    def __init__(self, source: str, shard: int, file: str, reason: str) -> None:
        # All four are the arguments, so that another rank can be sent it.
        super().__init__(source, shard, file, reason)
        self.source = source
        self.shard = shard
        self.file = file
        self.reason = reason

    def __str__(self) -> str:
        return f"the shard {self.file} of {self.source} cannot be used: {self.reason}"


@dataclass(frozen=True, kw_only=True, slots=True)
class Quarantine:
    """For each source the files of its bad shards, and the first step, counted from 1, whose rows are replaced.

    Files and not places: a source that is listed in another order has the same ones.
    """

    first_steps: Mapping[str, Mapping[str, int]] = field(default_factory=dict)

    @classmethod
    def from_json(cls, value: Any) -> "Quarantine":
        """What `to_json` gave."""
        return cls(
            first_steps={
                str(source): {str(file): int(step) for file, step in files.items()}
                for source, files in value.items()
            }
        )

    def to_json(self) -> dict[str, dict[str, int]]:
        """Plain values, the same for the same quarantine."""
        return {
            source: dict(sorted(files.items()))
            for source, files in sorted(self.first_steps.items())
        }

    @property
    def steps(self) -> Sequence[int]:
        """The steps at which shards join, in order."""
        found = {step for files in self.first_steps.values() for step in files.values()}
        return sorted(found)

    def extended(
        self, found: Iterable[BadShard], step: int
    ) -> tuple["Quarantine", Sequence[BadShard]]:
        """With more shards whose rows are replaced from a step on; and those that were not replaced in that step before.

        The order in which they are given, and how often, changes nothing. Where none is new the step fails by what
        is replaced already: it will fail again.
        """
        files = {source: dict(known) for source, known in self.first_steps.items()}
        new = []
        for bad in sorted(found, key=lambda bad: (bad.source, bad.file)):
            known = files.setdefault(bad.source, {})
            if known.get(bad.file, step + 1) > step:
                known[bad.file] = step
                new.append(bad)
        return Quarantine(first_steps=files), new


EMPTY = Quarantine()
