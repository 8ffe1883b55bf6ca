"""Exports the model of a run with its card, and checks that the export loads and generates.

The numbers of the card are those of metrics.jsonl: the last evaluation, and the totals of the last
step.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import yaml

from bigmix import __version__
from bigmix.data.stream import Stream
from bigmix.errors import BadInput, BigmixError
from bigmix.model.causal_lm import max_positions
from bigmix.model.export import export
from bigmix.model.loading import open_whole
from bigmix.recipe import Recipe, to_yaml
from bigmix.recipe.shares import SourceShare
from bigmix.runs.layout import BEHAVIOUR, EXPORT
from bigmix.runs.metrics_log import METRICS, read_lines
from bigmix.terminal import UNKNOWN, percent
from bigmix.text.chat_template import PLAIN, PLAIN_SHA256
from bigmix.text.tokenizer import load_tokenizer
from bigmix.train.inputs import RunInputs
from bigmix.train.state import Run, TrainState
from bigmix.types import IGNORE

_LIBRARIES = ("torch", "transformers", "deepspeed", "safetensors")
_TASK = re.compile(r"task/(.+)/([^/]+)")
_CONTENT_DIGITS = 16
_LARGEST_GIB = 8.0  # of weights that are loaded a second time, in addition to what the run holds
_LONGEST_PROMPT, _SHORTEST_PROMPT, _CONTINUATION = 64, 8, 24  # tokens


def export_model(run: Run, state: TrainState, tokenizer_folder: Path) -> None:
    """Write the model with its card, then load the export and let it generate; a collective.

    A failure of that check is a warning: the export is already written.
    """
    recipe, inputs, is_first = run.recipe, run.inputs, run.cluster.world.is_first
    folder = Path(recipe.output) / EXPORT
    run.watchdog.doing(f"describing {folder}")
    texts = {}
    if is_first:
        lines = read_lines(Path(recipe.output) / METRICS)
        texts = {"README.md": model_card(recipe, inputs, lines), **_template(inputs)}
    export(
        run.engine,
        run.cluster,
        tokenizer_folder,
        folder,
        shard_bytes=int(recipe.checkpoint.export_shard_gib * 2**30),
        texts=texts,
        on_activity=run.watchdog.doing,
    )
    run.terminal.note(f"model written to {folder}")
    if is_first:
        run.watchdog.doing(f"loading {folder}")
        _check(run, state, folder)
    run.cluster.barrier()


def _template(inputs: RunInputs) -> dict[str, str]:
    """The built-in chat template where all chats are rendered with it; any other template is
    already in the tokenizer's folder.
    """
    templates = [source.manifest.template for source in inputs.sources.values()]
    hashes = {template.sha256 for template in templates if template is not None}
    return {"chat_template.jinja": PLAIN} if hashes == {PLAIN_SHA256} else {}


def _check(run: Run, state: TrainState, folder: Path) -> None:
    size_gib = _weights_gib(folder)
    if size_gib > _LARGEST_GIB:
        run.terminal.note(
            f"generation check left out: the model has {size_gib:.1f} GiB of weights, and up to"
            f" {_LARGEST_GIB:g} GiB are loaded again"
        )
        return
    held_out, plan = run.inputs.held_out, state.plan
    tasks = [name for name in run.recipe.task_names if name in held_out]
    streams = [*(held_out[name] for name in tasks), *held_out.values(), *plan.streams.values()]
    prompt = prompt_of(streams)
    if not prompt:
        run.terminal.note("generation check left out: no document can be read for a prompt")
        return
    try:
        generated = check_generation(folder, prompt)
    except (BadInput, OSError, ValueError, RuntimeError) as error:
        run.terminal.warning(f"generation check: {folder} does not load and generate ({error})")
        return
    run.terminal.note(
        f"generation check, from {folder} loaded again:"
        f" {generated.prompt!r} -> {generated.continuation!r}"
    )


def model_card(recipe: Recipe, inputs: RunInputs, lines: Sequence[Mapping[str, Any]]) -> str:
    """The card of a model that a recipe has trained; `lines` are those of its metrics.jsonl."""
    evaluations = [line for line in lines if line.get("eval")]
    steps = [line for line in lines if not line.get("eval")]
    last, evaluated = (found[-1] if found else {} for found in (steps, evaluations))
    sections = [
        _opening(recipe),
        _training(recipe, last),
        _mixture(recipe, inputs, last),
        _held_out(evaluated),
        _tasks(evaluated),
        _behaviour(evaluated),
        _reproduction(recipe),
    ]
    return front_matter(recipe.model.path) + "\n".join(filter(None, sections))


def front_matter(base: str | None) -> str:
    """The YAML at the head of a model card, which hubs read; `base` is the base model, if any."""
    keys: dict[str, Any] = {"library_name": "transformers", "pipeline_tag": "text-generation"}
    if base is not None:
        keys["base_model"] = base
    return f"---\n{yaml.safe_dump(keys | {'tags': ['bigmix']}, sort_keys=False)}---\n\n"


def versions() -> str:
    """The versions of bigmix and of the libraries that make a model."""
    return ", ".join([f"bigmix {__version__}", *(f"{name} {version(name)}" for name in _LIBRARIES)])


def table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table in Markdown; the first column is text, the others are numbers or short."""
    lines = [columns, ["---", *["---:"] * (len(columns) - 1)], *rows]
    return "".join(f"| {' | '.join(cell.replace('|', '/') for cell in line)} |\n" for line in lines)


def _opening(recipe: Recipe) -> str:
    made = recipe.model.path or f"a {(recipe.model.config or {})['model_type']} from scratch"
    replay = [name for name, source in recipe.sources.items() if source.role == "replay"]
    kept = f" and on {', '.join(replay)}, which keep what it knew" if replay else ""
    learned = (
        f"Trained from {made} on {', '.join(recipe.task_names)}{kept}."
        if recipe.task_names
        else f"Trained from {made} on {', '.join(replay)}."
    )
    return f"# {recipe.output.rstrip('/').rpartition('/')[2]}\n\n{learned}\n"


def _training(recipe: Recipe, last: Mapping[str, Any]) -> str:
    train = recipe.train
    tokens = sum(int(last.get(f"total_tokens/{name}", 0)) for name in recipe.sources)
    settings = [
        f"- steps: {last.get('step', 0):,} of {recipe.rows_per_step} rows; {tokens:,} tokens",
        f"- objective: {recipe.objective}",
        f"- optimizer: AdamW, learning rate {train.lr:g}, {train.schedule}; seed {recipe.seed}",
    ]
    if train.ema is not None:
        settings.append(f"- weights: their average over the steps, with a decay of {train.ema:g}")
    if recipe.reference is not None:
        weights = ", ".join(
            f"{kappa:g} on {name}" for name, kappa in recipe.reference.sources.items()
        )
        settings.append(f"- divergence from {recipe.reference_path}: weight {weights}")
    return "## Training\n\n" + "\n".join(settings) + "\n"


def _mixture(recipe: Recipe, inputs: RunInputs, last: Mapping[str, Any]) -> str:
    rows = []
    for name, source in recipe.sources.items():
        manifest = inputs.sources[name].manifest
        rows.append(
            [
                name,
                source.role,
                _share(source.share),
                *(
                    percent(last.get(f"{key}/{name}"), 2)
                    for key in ("share_rows", "share_tokens", "share_loss_tokens", "gradient_share")
                ),
                f"{last.get(f'total_tokens/{name}') or 0:,}",
                _number(last.get(f"epoch/{name}"), 2),
                f"{manifest.documents:,}",
                f"`{inputs.content[name][:_CONTENT_DIGITS]}`",
            ]
        )
    columns = (
        "source",
        "role",
        "share as written",
        "of rows",
        "of tokens",
        "of loss tokens",
        "of the gradient",
        "tokens trained",
        "epochs",
        "documents",
        "content",
    )
    tokenizer = inputs.manifest.tokenizer
    return (
        "## Mixture\n\n"
        + table(columns, rows)
        + "\n`content` is a hash of the shards of the prepared source; the tokenizer that made"
        f" them has the fingerprint `{tokenizer.fingerprint[:_CONTENT_DIGITS]}` and"
        f" {tokenizer.vocab_size:,} entries.\n"
    )


def _held_out(line: Mapping[str, Any]) -> str:
    names = [key.removeprefix("held_out_loss/") for key in line if key.startswith("held_out_loss/")]
    if not names:
        return ""
    rows = [
        [
            name,
            _with_interval(
                line.get(f"held_out_loss/{name}"),
                line.get(f"held_out_low/{name}"),
                line.get(f"held_out_high/{name}"),
            ),
            _number(line.get(f"bits_per_byte/{name}"), 4),
            _with_interval(
                line.get(f"forgetting/{name}"),
                line.get(f"forgetting_low/{name}"),
                line.get(f"forgetting_high/{name}"),
                sign="+",
            ),
            f"{line.get(f'held_out_tokens/{name}') or 0:,}",
        ]
        for name in names
    ]
    columns = ("held out", "loss, nats/token", "bits/byte", "forgetting, nats/token", "tokens")
    return (
        f"## Forgetting\n\nAfter step {line['step']}, with 95 % intervals. Forgetting is the"
        " held-out loss minus that before the first step: above 0 something was lost, below 0"
        " something was learned.\n\n" + table(columns, rows)
    )


def _tasks(line: Mapping[str, Any]) -> str:
    rows = []
    for key, value in line.items():
        found = _TASK.fullmatch(key)
        if found:
            task, score = found.groups()
            low, high = (line.get(f"task_{end}/{task}/{score}") for end in ("low", "high"))
            examples = line.get(f"task_examples/{task}")
            rows.append([task, score, _with_interval(value, low, high), str(examples or "–")])
    if not rows:
        return ""
    return "## Tasks\n\n" + table(("task", "score", "value", "examples"), rows)


def _behaviour(line: Mapping[str, Any]) -> str:
    rows = [
        [
            key.removeprefix(f"{BEHAVIOUR}/"),
            _with_interval(
                value, *(line.get(key.replace("/", end)) for end in ("_low/", "_high/"))
            ),
        ]
        for key, value in line.items()
        if key.startswith(f"{BEHAVIOUR}/")
    ]
    if not rows:
        return ""
    return (
        f"## Behaviour\n\nAnswers to {line['behaviour_prompts']} general prompts, next to those of"
        " the base, with 95 % intervals: loss, forgetting and KL(base || model) on the base's"
        " answers in nats/token, the others as parts of the model's own answers, and their mean"
        " length in tokens.\n\n" + table(("measure", "value"), rows)
    )


def _reproduction(recipe: Recipe) -> str:
    return (
        f"## How it was made\n\nMade with {versions()}:\n\n    deepspeed launch/train.py"
        f" recipe.yaml\n\nwith this recipe:\n\n```yaml\n{to_yaml(recipe).strip()}\n```\n"
    )


def _share(share: SourceShare) -> str:
    if isinstance(share, tuple):
        return ", ".join(f"{value:g} at step {step}" for step, value in share)
    return str(share)


def _number(value: float | None, digits: int, sign: str = "") -> str:
    return UNKNOWN if value is None else f"{value:{sign}.{digits}f}"


def _with_interval(
    value: float | None, low: float | None, high: float | None, *, sign: str = ""
) -> str:
    text = _number(value, 4, sign)
    if low is None or high is None:
        return text
    return f"{text} ({_number(low, 4, sign)} to {_number(high, 4, sign)})"


@dataclass(frozen=True, kw_only=True, slots=True)
class GeneratedText:
    """A prompt and its most probable continuation: text where the folder has a tokenizer, else
    ids.
    """

    prompt: str
    continuation: str


def prompt_of(streams: Sequence[Stream]) -> Sequence[int]:
    """The ids that the first readable document begins with: of a chat those before its first
    answer, of a text the first few. Empty where no document can be read.
    """
    for stream in streams:
        try:
            row = stream.read(stream.in_shard_order()[0])
        except BigmixError:  # another stream may have a shard that can be read
            continue
        end = int(row.starts_P[1]) if len(row.starts_P) > 1 else row.num_tokens
        ids = row.ids_T[:end].tolist()
        in_loss = [at for at, label in enumerate(row.labels_T[:end].tolist()) if label != IGNORE]
        first = in_loss[0] + 1 if in_loss and in_loss[0] > 0 else _SHORTEST_PROMPT
        prompt: list[int] = ids[: min(first, end - 1)][-_LONGEST_PROMPT:]
        if prompt:
            return prompt
    return []


def _weights_gib(folder: Path) -> float:
    """The size of the weights in a folder."""
    return sum(path.stat().st_size for path in folder.glob("*.safetensors")) / 2**30


def check_generation(folder: Path, prompt: Sequence[int]) -> GeneratedText:
    """Load a folder as any other program would, on the CPU, and continue a prompt greedily.

    Raises BadInput where the folder does not load.
    """
    model = open_whole(folder, dtype="auto", device=torch.device("cpu"))
    capacity = max_positions(model.config) or _LONGEST_PROMPT + _CONTINUATION
    ids_BT = torch.tensor([list(prompt)])[:, : max(1, capacity - _CONTINUATION)]
    with torch.no_grad():
        generated_BT = model.generate(
            ids_BT,
            attention_mask=torch.ones_like(ids_BT),
            max_new_tokens=min(_CONTINUATION, capacity - ids_BT.shape[1]),
            do_sample=False,
            pad_token_id=0,  # a single row has no padding; without this there is a warning
        )
    shown, new = ids_BT[0].tolist(), generated_BT[0, ids_BT.shape[1] :].tolist()
    if not (folder / "tokenizer.json").is_file():
        return GeneratedText(prompt=str(shown), continuation=str(new))
    tokenizer = load_tokenizer(str(folder))
    return GeneratedText(prompt=tokenizer.decode(shown), continuation=tokenizer.decode(new))
