"""The folder of a run's checkpoints goes in; out comes the newest whole one, and its states in an engine of any number of ranks."""

from dataclasses import dataclass
from pathlib import Path

from bigmix.cluster.collectives import Cluster
from bigmix.model.engine import Engine
from bigmix.runs.checkpoints import Listed, faults_of, folders, read_listing
from bigmix.runs.state_file import StateReader


@dataclass(frozen=True, kw_only=True, slots=True)
class Found:
    """The newest whole checkpoint, None where there is none, and what is wrong with each newer one."""

    listed: Listed | None
    torn: tuple[str, ...] = ()


def newest_whole(folder: Path, cluster: Cluster, *, before: int | None = None) -> Found:
    """Look for the newest checkpoint whose files are all as they were written, of a step below `before` where that is given.

    A collective: each rank reads a part of the files.
    """
    listings = list(map(read_listing, folders(folder, before))) if cluster.world.is_first else None
    (candidates, *_) = cluster.gather(listings)
    torn: list[str] = []
    for candidate in candidates:
        if isinstance(candidate, str):
            torn.append(candidate)
            continue
        own = slice(cluster.world.rank, None, cluster.world.size)
        faults = [f for part in cluster.gather(list(faults_of(candidate, own))) for f in part]
        if not faults:
            return Found(listed=candidate, torn=tuple(torn))
        torn += faults
    return Found(listed=None, torn=tuple(torn))


def restore(engine: Engine, listed: Listed) -> None:
    """Put weights and optimizer back, whatever number of ranks wrote them; a collective."""
    engine.put_back(StateReader(listed.path).fill)
