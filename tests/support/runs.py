"""Starts runs of training, waits for them, and reads what they leave."""

import json
import sys
import time
from pathlib import Path

from support.corpora import write_source
from support.ranks import ROOT, environment, free_port, start_script

RECIPE = """\
model: {config: {model_type: llama, vocab_size: 96, hidden_size: 32, intermediate_size: 64,
                 num_hidden_layers: 1,
                 num_attention_heads: 4, max_position_embeddings: 64, attention_dropout: 0.1}}
sequence_length: 64
rows_per_step: 8
sources:
  web: {path: web, role: replay, share: [[0, 0.5], [8, 0.25]]}
  chat: {path: chat, role: task, share: 0.75, held_out: held}
budget: {steps: 8}
train: {lr: 1e-2, micro_batch_rows: 2, log_every: 1}
evaluate: {every: 4}
checkpoint: {every: 2}
deepspeed: ds_configs/cpu.json
output: run
"""
TIMES = ("_s", "tokens_per_s", "peak_gib")


def recipe_with_sources(folder):
    """Write the recipe and the sources that it reads; returns the folder."""
    write_source(folder / "web", "text")
    write_source(folder / "chat", "chat", seed=1)
    write_source(folder / "held", "chat", seed=1, shards=1)
    (folder / "recipe.yaml").write_text(RECIPE)
    return folder


def bare(extra):
    """An environment whose PATH has only the programs of the venv: no compiler, no shell tools."""
    path = str(Path(sys.executable).parent)
    return extra | {"PATH": path, "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}


def start(data, num_ranks, *overrides, recipe="recipe.yaml"):
    """Start the ranks of a run as plain processes, as srun does."""
    port, script = free_port(), ROOT / "launch/train.py"
    return [
        start_script(script, data, bare(environment(rank, num_ranks, port)), recipe, *overrides)
        for rank in range(num_ranks)
    ]


def by_deepspeed(*overrides):
    """The command that starts two ranks with the deepspeed launcher."""
    launcher = str(Path(sys.executable).with_name("deepspeed"))
    script = str(ROOT / "launch/train.py")
    return [
        launcher,
        "--num_gpus",
        "2",
        "--master_port",
        str(free_port()),
        script,
        "recipe.yaml",
        *overrides,
    ]


def end(processes, timeout_s=240):
    """Wait for processes; their exit codes, and all that they have printed."""
    outputs = [process.communicate(timeout=timeout_s)[0] for process in processes]
    return [process.returncode for process in processes], "\n".join(outputs)


def wait_for(path, processes):
    until = time.monotonic() + 120
    while not path.exists():
        assert time.monotonic() < until and all(p.poll() is None for p in processes), end(processes)
        time.sleep(0.02)


def lines(folder):
    """The lines of metrics.jsonl without what differs between two runs: times, speed, memory."""
    found = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if not k.endswith(TIMES)} for line in found]


def weights(folder):
    return (folder / "export/model.safetensors").read_bytes()


LONG = ("budget.steps=100000", "checkpoint.keep=1", "sources.web.share=0.25")


def catches(process, number):
    """Whether a process has installed a handler for a signal."""
    status = Path(f"/proc/{process.pid}/status").read_text()
    caught = next(line for line in status.splitlines() if line.startswith("SigCgt"))
    return int(caught.split()[1], 16) >> (number - 1) & 1


def wait_until(condition, within_s=120.0):
    until = time.monotonic() + within_s
    while not condition():
        assert time.monotonic() < until
        time.sleep(0.02)


def step_of(folder):
    """The step of the newest checkpoint."""
    return int((folder / "checkpoints/latest").read_text().split("-")[1])
