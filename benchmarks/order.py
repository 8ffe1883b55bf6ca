"""Measures how far the order in which a loader gives the rows of a source is from a true shuffle.

A row is a pair (shard, row of the shard); its index counts rows over the shards in their order.
"""

import random
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import ours

Indices = npt.NDArray[np.int64]


def compare(folder: Path, num_shards: int, num_rows: int) -> dict[str, Any]:
    """The measures of every order by its name, or why there are none for a peer."""
    row_ids, sizes = ours.simulated_order(folder, num_shards, num_rows)
    begins = np.concatenate([[0], np.cumsum(sizes)])
    count = int(begins[-1])
    own = begins[row_ids.shards_R] + row_ids.rows_R
    orders = {
        "bigmix": own,
        "true shuffle": np.random.default_rng(0).permutation(count)[:num_rows],
        "file order": np.arange(count)[:num_rows],
    }
    result: dict[str, Any] = {name: measures(order, begins) for name, order in orders.items()}
    for name, make in {"webdataset": _webdataset, "mosaicml (py1e)": _mosaicml}.items():
        try:
            result[name] = measures(np.array(make(sizes)[:num_rows], np.int64), begins)
        except ImportError as error:
            result[name] = {"fault": str(error)}
    return {"orders": result, "rows": min(num_rows, count), "shards": len(sizes)}


def measures(order: Indices, begins: Indices) -> dict[str, float]:
    """How often neighbours in the order are of one shard, and next to each other in the file, and
    the correlation of their indices.

    `step_shards` is the mean number of shards among the 64 rows of a step.
    """
    shards = np.searchsorted(begins, order, side="right") - 1
    steps = [len(set(shards[at : at + 64].tolist())) for at in range(0, len(order) - 63, 64)]
    return {
        "same_shard": float((shards[1:] == shards[:-1]).mean()),
        "adjacent": float((np.abs(np.diff(order)) == 1).mean()),
        "correlation": float(np.corrcoef(order[1:], order[:-1])[0, 1]),
        "step_shards": float(np.mean(steps)),
    }


def _webdataset(sizes: Sequence[int]) -> Sequence[int]:
    """Shards are shuffled, then samples in a buffer of 1,000, by the library."""
    from peers import webdataset

    begins = np.concatenate([[0], np.cumsum(sizes)]).tolist()

    def in_shards() -> Iterator[int]:
        shards = list(range(len(sizes)))
        random.Random(0).shuffle(shards)
        for shard in shards:
            yield from range(begins[shard], begins[shard + 1])

    return list(webdataset.shuffled(in_shards()))


def _mosaicml(sizes: Sequence[int]) -> Sequence[int]:
    from streaming.base.shuffle import get_shuffle

    return list(get_shuffle("py1e", np.array(sizes, np.int64), 1, 0, 0, 4_000_000).tolist())
