"""A step that had no finite gradient goes in; the rows that may be to blame come out, each with its documents."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from bigmix.data.loader import Plan, Portion
from bigmix.data.rows import PADDING


@dataclass(frozen=True, kw_only=True, slots=True)
class Suspect:
    """A row of a micro-batch on a rank: documents `first_document` .. `last_document` of a shard are in it."""

    step: int
    rank: int
    micro_batch: int
    source: str
    epoch: int
    shard: str
    row: int
    first_document: int
    last_document: int


def suspects(plan: Plan, portion: Portion, step: int, micro_batches: Sequence[int]) -> list[Suspect]:  # fmt: skip
    """The rows of some micro-batches of a rank in a step; their shards are read again."""
    row_ids = plan.places(portion, step).ids()
    streams = plan.streams_at(step)
    found = []
    for micro_batch in micro_batches:
        begin = micro_batch * portion.micro_batch_rows
        for row_id in row_ids[begin : begin + portion.micro_batch_rows]:
            stream = streams[row_id.source]
            documents = stream.rows(row_id.shard, np.array([row_id.row])).documents_P
            documents = documents[documents != PADDING]
            found.append(
                Suspect(
                    step=step,
                    rank=portion.rank,
                    micro_batch=micro_batch,
                    source=row_id.source,
                    epoch=row_id.epoch,
                    shard=stream.manifest.shards[row_id.shard].file,
                    row=row_id.row,
                    first_document=int(documents.min()),
                    last_document=int(documents.max()),
                )
            )
    return found
