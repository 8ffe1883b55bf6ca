"""Two small models, sources to evaluate them on, and what a plain loop of transformers measures."""

import json
import math
import re
from pathlib import Path

import numpy as np
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from bigmix.commands.prepare.job import PrepareSettings, prepare
from bigmix.data.shards.manifest import read_manifest
from bigmix.data.shards.shard import open_shard
from bigmix.seeding import key_of

ROW = 64
TEXTS = [
    "The river keeps under the bright tower.",
    "It was seven, and 3.5",
    "a tower of the river learns (in it)!",
    "知识混合。",
    "to the tower 混合",
    "!!! ...",
    "The bright river was in the tower, under a bright river that it learns and keeps. Seven café",
    "of it\n",
]
CHATS = [
    ("what is under the tower", "the bright river."),
    ("is it seven", "it was 12"),
    ("the river learns", "a tower keeps the river bright\n"),
    ("知识", "混合知识"),
    ("keeps", "..."),
]
FEW = ["The tower was bright."]
RECIPE = """\
model: {path: base}
sequence_length: 64
rows_per_step: 6
sources:
  web: {path: text, role: replay, share: 0.5, held_out: text, whole_below: 64}
  chat: {path: chat, role: task, share: 0.5, held_out: chat}
held_out: {few: few}
budget: {steps: 2}
train: {lr: 1e-2, micro_batch_rows: 1, log_every: 1}
evaluate: {kl: true}
deepspeed: ds_configs/cpu.json
output: run
"""


def make(folder: Path, tokenizer: Path) -> Path:
    """Write the models `base` and `tuned`, the sources `text`, `chat` and `few`, and the recipe."""
    rows = {
        "text": [{"text": text} for text in TEXTS],
        "chat": [{"prompt": prompt, "response": response} for prompt, response in CHATS],
        "few": [{"text": text} for text in FEW],
    }
    for name, of_source in rows.items():
        path = folder / f"{name}.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in of_source))
        prepare(
            PrepareSettings(
                inputs=[str(path)], tokenizer=str(tokenizer), output=str(folder / name)
            ),
            lambda *_: None,
        )
    _make_models(folder, tokenizer)
    (folder / "recipe.yaml").write_text(RECIPE)
    return folder


def _make_models(folder: Path, tokenizer: Path) -> None:
    whole = AutoTokenizer.from_pretrained(tokenizer)
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=400,
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=ROW,
        )
    )
    documents = [ids for name in ("text", "chat") for ids, _ in stored(folder / name)]
    adam = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for name, steps in (("base", 60), ("tuned", 160)):
        for step in range(steps):
            ids = torch.tensor(documents[step % len(documents)])[None]
            model(input_ids=ids, labels=ids).loss.backward()
            adam.step()
            adam.zero_grad()
        model.save_pretrained(folder / name)
        whole.save_pretrained(folder / name)


def stored(folder: Path) -> list[tuple[list[int], list[bool]]]:
    """The token ids of each document of a source, and which of them are in the loss."""
    manifest = read_manifest(str(folder))
    found = []
    for entry in manifest.shards:
        shard = open_shard(folder, entry, manifest.dtype)
        for begin, end in zip(shard.offsets, shard.offsets[1:], strict=False):
            mask = np.ones(end - begin, bool)
            if manifest.kind == "chat":
                mask = shard.loss_mask(begin, end)
            mask[0] = False
            found.append((shard.tokens(begin, end).tolist(), mask.tolist()))
    return found


def last_words(texts: list[str]) -> list[slice | None]:
    """The characters of the last word of each text, found by a pattern that fits these texts."""
    found = [re.search(r"([一-鿿]|[a-zA-Z0-9é.]*[a-zA-Z0-9é])[^\w]*$", text) for text in texts]
    return [slice(*match.span(1)) if match else None for match in found]


def by_loop(folder: Path, name: str, model: str, base: str) -> dict[str, np.ndarray]:
    """The sums `tokens, nll, hits, kl, words, word_hits` of each document, without packing."""
    models = [AutoModelForCausalLM.from_pretrained(folder / path) for path in (model, base)]
    tokenizer = AutoTokenizer.from_pretrained(folder / "base")
    texts = {"text": TEXTS, "few": FEW, "chat": [f" {response}" for _, response in CHATS]}[name]
    columns = {key: [] for key in ("tokens", "nll", "hits", "kl", "words", "word_hits")}
    documents = stored(folder / name)
    for (ids, in_loss), text, word in zip(documents, texts, last_words(texts), strict=True):
        shown = torch.tensor(ids)[None]
        with torch.no_grad():
            logs, base_logs = (m(input_ids=shown).logits[0].double().log_softmax(1) for m in models)
        places = [at for at in range(1, len(ids)) if in_loss[at]]
        hits = {at: int(logs[at - 1].argmax()) == ids[at] for at in places}
        columns["tokens"].append(len(places))
        columns["nll"].append(-sum(float(logs[at - 1, ids[at]]) for at in places))
        columns["hits"].append(sum(hits.values()))
        columns["kl"].append(
            sum(float((base_logs[t - 1].exp() * (base_logs - logs)[t - 1]).sum()) for t in places)
        )
        offsets = tokenizer(text, return_offsets_mapping=True, add_special_tokens=False)
        # The model's text is the end of the document, before the token that ends the document.
        first = len(ids) - 1 - len(offsets["input_ids"])
        assert ids[first:-1] == offsets["input_ids"]
        of_word = [
            first + at
            for at, (begin, end) in enumerate(offsets["offset_mapping"])
            if word is not None and begin < word.stop and end > word.start
        ]
        is_scored = bool(of_word) and all(at in hits for at in of_word)
        columns["words"].append(is_scored)
        columns["word_hits"].append(is_scored and all(hits[at] for at in of_word))
    return {key: np.array(values, float) for key, values in columns.items()}


def obvious_intervals(
    source: str, measures: dict, documents: int
) -> dict[str, tuple[float, float]]:
    """The bootstrap interval of each measure, computed by drawing documents one by one.

    A measure is a function of the indices of the documents that were drawn.
    """
    draws = np.random.default_rng(key_of("interval", source))
    values = {name: [] for name in measures}
    for _ in range(1000):
        drawn = [int(index) for index in draws.integers(0, documents, documents)]
        for name, measure in measures.items():
            values[name].append(measure(drawn))
    return {
        name: tuple(np.quantile([v for v in of_one if not math.isnan(v)], [0.025, 0.975]))
        for name, of_one in values.items()
    }


def expected_line(folder: Path, name: str, source: str, model: str, base: str | None) -> dict:
    """What an evaluation line must hold for a source.

    `name` is the folder of the source, `source` its name in the recipe.
    """
    now = by_loop(folder, name, model, base or model)
    before = by_loop(folder, name, base or model, base or model)
    manifest = read_manifest(str(folder / name))
    per_byte = manifest.loss_tokens / manifest.loss_bytes / math.log(2)

    def ratio(above, below, of=now):
        def measure(drawn):
            count = of[below][drawn].sum()
            return of[above][drawn].sum() / count if count else math.nan

        return measure

    loss, loss_before = ratio("nll", "tokens"), ratio("nll", "tokens", before)
    measures = {
        "held_out_loss": loss,
        "perplexity": lambda drawn: math.exp(loss(drawn)),
        "bits_per_byte": lambda drawn: loss(drawn) * per_byte,
        "token_accuracy": ratio("hits", "tokens"),
        "last_word_accuracy": ratio("word_hits", "words"),
    }
    if base is not None:
        measures["forgetting"] = lambda drawn: loss(drawn) - loss_before(drawn)
        measures["kl_to_base"] = ratio("kl", "tokens")
    everything = list(range(len(now["tokens"])))
    intervals = obvious_intervals(source, measures, len(everything))
    line = {}
    for key, measure in measures.items():
        ends = "held_out" if key == "held_out_loss" else key
        line[f"{key}/{source}"] = measure(everything)
        known = len(everything) > 1
        line[f"{ends}_low/{source}"], line[f"{ends}_high/{source}"] = (
            intervals[key] if known else (None, None)
        )
    line[f"held_out_tokens/{source}"] = now["tokens"].sum()
    line[f"held_out_documents/{source}"] = len(everything)
    line[f"last_words/{source}"] = now["words"].sum()
    line[f"held_out_chat/{source}"] = manifest.kind == "chat"
    return line
