"""Two small prepared sources, the recipe of a small run, and damage to a shard."""

import tarfile
from pathlib import Path

import numpy as np

from bigmix.data.shards.manifest import (
    Manifest,
    ShardTable,
    TemplateEntry,
    TokenizerEntry,
    token_dtype,
    write_manifest,
)
from bigmix.data.shards.shard import ShardWriter, with_lengths

ROOT = Path(__file__).resolve().parent.parent
VOCABULARY = 96
STEPS, SAVE_EVERY = 14, 3
SHARDS, DOCUMENTS = 24, 10  # small shards: new ones are opened all along the run
TOKENIZER = TokenizerEntry(
    name="tiny", fingerprint="f" * 64, vocab_size=VOCABULARY, bos_id=None, eos_id=2
)
TEMPLATE = TemplateEntry(name="plain", sha256="0" * 64)
# Without dropout, which draws different units on each rank.
RECIPE = f"""\
model: {{config: {{model_type: llama, vocab_size: {VOCABULARY}, hidden_size: 32,
                 intermediate_size: 64,
                 num_hidden_layers: 2, num_attention_heads: 4, max_position_embeddings: 64,
                 attention_dropout: 0}}}}
sequence_length: 64
rows_per_step: 8
sources:
  web: {{path: web, role: replay, share: [[0, 0.5], [8, 0.25]]}}
  chat: {{path: chat, role: task, share: 0.75}}
budget: {{steps: {STEPS}}}
train: {{lr: 1e-2, schedule: constant, micro_batch_rows: 2, log_every: 1, prefetch_steps: 1}}
checkpoint: {{every: {SAVE_EVERY}}}
health: {{dead_after_s: 20, hang_minutes: 0.5}}
deepspeed: {ROOT}/ds_configs/cpu.json
output: run
"""


def write_data(folder: Path) -> None:
    """Write the sources `web` and `chat`, and `recipe.yaml`, which uses them."""
    for seed, kind in enumerate(("text", "chat")):
        _write_source(folder / {"text": "web"}.get(kind, kind), kind, seed)
    (folder / "recipe.yaml").write_text(RECIPE)


def _write_source(folder: Path, kind: str, seed: int) -> None:
    """Write a source whose tokens count upwards in steps that depend on the seed."""
    folder.mkdir(parents=True)
    draw, dtype, entries = np.random.default_rng(seed), token_dtype(VOCABULARY), []
    for index in range(SHARDS):
        writer = ShardWriter(folder / f"shard-{index:05d}.tar", dtype, masked=kind == "chat")
        for _ in range(DOCUMENTS):
            length, first = int(draw.integers(5, 60)), int(draw.integers(3, VOCABULARY))
            ids = 3 + (first + np.arange(length) * (2 + seed)) % (VOCABULARY - 3)
            mask = np.arange(length) > length // 2 if kind == "chat" else None
            writer.add(ids.astype(dtype), mask)
        entries.append(writer.close())
    loss_tokens = sum(entry.loss_tokens for entry in entries)
    manifest = Manifest(
        kind="chat" if kind == "chat" else "text",
        dtype=dtype,
        tokenizer=TOKENIZER,
        template=TEMPLATE if kind == "chat" else None,
        read=SHARDS * DOCUMENTS,
        dropped={},
        documents=SHARDS * DOCUMENTS,
        tokens=sum(entry.tokens for entry in entries),
        loss_tokens=loss_tokens,
        loss_bytes=loss_tokens,
        shards=ShardTable.of(entries),
    )
    write_manifest(folder, with_lengths(folder, manifest))


def damage(path: Path, *, removed: bool) -> None:
    """Delete a shard, or change one bit of its tokens."""
    if removed:
        path.unlink()
        return
    with tarfile.open(path) as tar:
        tokens = next(member for member in tar if member.name.endswith("tokens.npy"))
    with path.open("r+b") as file:
        file.seek(tokens.offset_data + tokens.size - 1)
        last = file.read(1)[0]
        file.seek(-1, 1)
        file.write(bytes([last ^ 1]))
