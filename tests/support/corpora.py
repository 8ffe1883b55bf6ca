"""Prepared sources of generated tokens: small, learnable, and different from one another."""

import random
import tempfile
from pathlib import Path

import numpy as np
from support.models import VOCABULARY

from bigmix.data.packing import PackingOptions
from bigmix.data.records import RowId
from bigmix.data.run_plan import RunPlan, SequenceLengthStage
from bigmix.data.shards.manifest import (
    Manifest,
    TemplateEntry,
    TokenizerEntry,
    token_dtype,
    write_manifest,
)
from bigmix.data.shards.prefetch import Ahead
from bigmix.data.shards.retry import Retry
from bigmix.data.shards.shard import ShardWriter, with_lengths
from bigmix.data.source import RemoteReadOptions, ShardStore, read_source
from bigmix.data.stream import Stream
from bigmix.text.chat_template import PLAIN_SHA256

READING = RemoteReadOptions(
    folder=Path(tempfile.gettempdir()) / "bigmix-test-cache",
    max_bytes=1 << 30,
    retry=Retry(tries=3, first_wait_s=0.01, timeout_s=2.0),
    ahead=Ahead(),
)
FINGERPRINT = "f" * 64


def write_source(
    folder: Path,
    kind: str = "text",
    *,
    seed: int = 0,
    shards: int = 2,
    documents: int = 40,
    lengths: tuple[int, int] = (5, 60),
    fingerprint: str = FINGERPRINT,
) -> Path:
    """Write a prepared source whose tokens count upwards in steps that depend on the seed."""
    folder.mkdir(parents=True)
    draw = np.random.default_rng(seed)
    entries = []
    dtype = token_dtype(VOCABULARY)
    for index in range(shards):
        writer = ShardWriter(folder / f"shard-{index:05d}.tar", dtype, masked=kind == "chat")
        for _ in range(documents):
            length = int(draw.integers(*lengths))
            first = int(draw.integers(3, VOCABULARY))
            ids = (3 + (first + np.arange(length) * (2 + seed)) % (VOCABULARY - 3)).astype(dtype)
            mask = None
            if kind == "chat":
                mask = np.arange(length) > length // 2
            writer.add(ids, mask)
        entries.append(writer.close())
    manifest = Manifest(
        kind=kind,
        dtype=dtype,
        tokenizer=TokenizerEntry(
            name="tiny", fingerprint=fingerprint, vocab_size=VOCABULARY, bos_id=None, eos_id=2
        ),
        template=TemplateEntry(name="plain", sha256=PLAIN_SHA256) if kind == "chat" else None,
        read=shards * documents,
        dropped={},
        documents=shards * documents,
        tokens=sum(entry.tokens for entry in entries),
        loss_tokens=sum(entry.loss_tokens for entry in entries),
        loss_bytes=3 * sum(entry.loss_tokens for entry in entries),
        shards=tuple(entries),
    )
    write_manifest(folder, with_lengths(folder, manifest))
    return folder


def open_stream(name: str, path: str, packing: PackingOptions, seed: int = 0) -> Stream:
    """The rows of a prepared source."""
    return ShardStore(READING).stream(name, read_source(path), packing, seed=seed)


WORDS = [
    "the",
    "of",
    "and",
    "a",
    "to",
    "in",
    "it",
    "is",
    "was",
    "river",
    "tower",
    "under",
    "bright",
    "seven",
    "learns",
    "keeps",
    "12",
    "3.5",
    "混合",
    "知识",
    "café",
]


def generated_texts(count: int, seed: int = 0) -> list[str]:
    """Sentences of a few words, the same for the same seed."""
    draw = random.Random(seed)
    return [
        " ".join(draw.choices(WORDS, k=draw.randint(3, 30))).capitalize() + ".\n"
        for _ in range(count)
    ]


def locate(stream: Stream, index: int) -> RowId:
    """Which row a stream's `index`-th is, counted from 0 over all epochs."""
    return stream.row_ids(np.array([index])).ids()[0]


def one_stage(streams) -> list[SequenceLengthStage]:
    """Rows of one length for the whole run."""
    return [SequenceLengthStage(first_step=1, streams=streams)]


def endless_plan(mixture, stages, seed=0, **given) -> RunPlan:
    """A plan of more steps than any test takes."""
    return RunPlan(
        mixture=mixture,
        stages=stages,
        seed=seed,
        steps=10**9,
        loss_shares=mixture.shares,
        **given,
    )
