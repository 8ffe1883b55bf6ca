"""How fast rows are mixed, packed and read: one command, one table, each figure beside its limit in the same run.

python benchmarks/mixture.py [--tokens 20M]
"""

import argparse
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from bigmix.data.loader import Plan, Portion, step_batch
from bigmix.data.mixture import Mixture
from bigmix.data.shards import (
    Manifest,
    ShardWriter,
    TemplateEntry,
    TokenizerEntry,
    write_manifest,
)
from bigmix.data.stream import Stream
from bigmix.recipe.models import whole_number

ROW, ROWS_PER_STEP = 2048, 64


def write(folder: Path, kind: str, tokens: int) -> Manifest:
    """A prepared source of random tokens with document lengths as chats and web pages have them."""
    folder.mkdir()
    draw = np.random.default_rng(0)
    writer = ShardWriter(folder / "shard-000000.tar", "uint16", masked=kind == "chat")
    while writer.tokens < tokens:
        length = int(np.clip(draw.lognormal(5.2 if kind == "chat" else 6.5, 0.8), 8, ROW))
        ids = draw.integers(0, 50_000, length).astype(np.uint16)
        writer.add(ids, np.arange(length) > length // 2 if kind == "chat" else None)
    entry = writer.close()
    manifest = Manifest(
        kind="chat" if kind == "chat" else "text",
        dtype="uint16",
        tokenizer=TokenizerEntry(
            name="random", fingerprint="0" * 64, vocab_size=50_000, bos_id=None, eos_id=0
        ),
        template=TemplateEntry(name="plain", sha256="0" * 64) if kind == "chat" else None,
        read=entry.documents,
        dropped={},
        documents=entry.documents,
        tokens=entry.tokens,
        loss_tokens=entry.loss_tokens,
        loss_bytes=entry.loss_tokens,
        shards=(entry,),
    )
    write_manifest(folder, manifest)
    return manifest


def timed(work: Callable[[], int]) -> float:
    """Units a second of `work`, which returns how many it did; the best of three runs."""
    best = 0.0
    for _ in range(3):
        began = time.process_time()
        units = work()
        best = max(best, units / (time.process_time() - began))
    return best


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=whole_number, default=20_000_000)
    tokens = int(parser.parse_args().tokens)
    with tempfile.TemporaryDirectory() as temporary:
        top = Path(temporary)
        manifests = {kind: write(top / kind, kind, tokens) for kind in ("text", "chat")}
        streams = {
            kind: Stream(
                kind, str(top / kind), manifest, row_tokens=ROW, long_documents="drop", seed=0
            )
            for kind, manifest in manifests.items()
        }
        plan = Plan(
            mixture=Mixture({"text": 0.2, "chat": 0.8}, ROWS_PER_STEP),
            streams=streams,
            rows_per_step=ROWS_PER_STEP,
            seed=0,
        )
        portion = Portion(rank=0, ranks=1, rows_per_step=ROWS_PER_STEP, micro_batch_rows=8)
        steps = max(2, tokens // (ROW * ROWS_PER_STEP) // 2)

        def loaded() -> int:
            return sum(sum(step_batch(plan, portion, k).tokens.values()) for k in range(1, steps))

        def copied() -> int:
            raw = np.memmap(top / "text/shard-000000.tar", np.uint16, mode="r")
            rows = len(raw) // ROW
            for row in range(rows):
                np.asarray(raw[row * ROW : (row + 1) * ROW]).astype(np.int64)
            return rows * ROW

        limit, found = timed(copied), timed(loaded)
        mixed = timed(lambda: len(plan.mixture.rows(0, 200_000)))
        print(f"{'part':<44}{'a CPU second':>16}{'of the limit':>14}")
        print(
            f"{'copy rows from the file, widened (limit)':<44}{limit / 1e6:>14.1f}M {'100 %':>13}"
        )
        print(
            f"{'rows mixed, packed, labelled, 80/20':<44}{found / 1e6:>14.1f}M {found / limit:>12.1%} "
        )
        print(f"{'rows assigned to sources':<44}{mixed / 1e6:>14.2f}M {'':>13}")
        for kind, stream in streams.items():
            filled = stream.tokens_per_epoch / (stream.rows_per_epoch * ROW)
            print(f"{f'{kind} rows filled':<44}{filled:>16.2%}")


if __name__ == "__main__":
    main()
