"""A recipe, its inputs and the lines of its run go in; the model card of the export comes out, in
Markdown.

Numbers are those of metrics.jsonl: the last evaluation, and the totals of the last step.

The folder of an export goes in, loaded anew; what the model says behind a prompt comes out.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import transformers
import yaml

from bigmix import __version__
from bigmix.data.stream import Stream
from bigmix.errors import BigmixError
from bigmix.model.causal_lm import max_positions
from bigmix.model.export import export
from bigmix.recipe import Recipe, to_yaml
from bigmix.recipe.shares import SourceShare
from bigmix.runs.layout import EXPORT
from bigmix.runs.metrics_log import METRICS, read_lines
from bigmix.text.chat_template import PLAIN, PLAIN_SHA256
from bigmix.text.tokenizer import load_tokenizer
from bigmix.train.inputs import RunInputs
from bigmix.train.state import Run, TrainState
from bigmix.types import IGNORE

_LIBRARIES = ("torch", "transformers", "deepspeed", "safetensors")
_TASK = re.compile(r"task/(.+)/([^/]+)")
_CONTENT_DIGITS = 16


def export_model(run: Run, state: TrainState, tokenizer_folder: Path) -> None:
    """Write the model with its card, then load it and let it generate; a collective."""
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
        shard_bytes=int(recipe.train.export_shard_gib * 2**30),
        texts=texts,
        on_activity=run.watchdog.doing,
    )
    run.terminal.note(f"model written to {folder}")
    if is_first:
        run.watchdog.doing(f"loading {folder}")
        _check(run, state, folder)
    run.cluster.barrier()


def _template(inputs: RunInputs) -> dict[str, str]:
    """The built-in chat template where all chats are rendered with it; another one lies with the
    tokenizer already.
    """
    templates = [source.manifest.template for source in inputs.sources.values()]
    found = {template.sha256 for template in templates if template is not None}
    return {"chat_template.jinja": PLAIN} if found == {PLAIN_SHA256} else {}


def _check(run: Run, state: TrainState, folder: Path) -> None:
    if size_gib(folder) > LARGEST_GIB:
        run.terminal.note(
            f"generation check left out: the model has {size_gib(folder):.1f} GiB, up to"
            f" {LARGEST_GIB:g} are loaded again"
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
        said = check_generation(folder, prompt)
    except (OSError, ValueError, RuntimeError) as error:
        run.terminal.warning(f"generation check: {folder} does not load and generate ({error})")
        return
    run.terminal.note(
        f"generation check, from {folder} loaded anew: {said.prompt!r} -> {said.continuation!r}"
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
        _reproduction(recipe),
    ]
    return front_matter(recipe.model.path) + "\n".join(filter(None, sections))


def front_matter(base: str | None) -> str:
    """The head of a model card: what hubs read of it."""
    told: dict[str, Any] = {"library_name": "transformers", "pipeline_tag": "text-generation"}
    if base is not None:
        told["base_model"] = base
    return f"---\n{yaml.safe_dump(told | {'tags': ['bigmix']}, sort_keys=False)}---\n\n"


def versions() -> str:
    """The libraries that made a model."""
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
    said = [
        f"- steps: {last.get('step', 0):,} of {recipe.rows_per_step} rows; {tokens:,} tokens",
        f"- objective: {recipe.objective}",
        f"- optimizer: AdamW, learning rate {train.lr:g}, {train.schedule}; seed {recipe.seed}",
    ]
    if train.ema is not None:
        said.append(f"- weights: their average over the steps, with a decay of {train.ema:g}")
    if recipe.reference is not None:
        weights = ", ".join(
            f"{kappa:g} on {name}" for name, kappa in recipe.reference.sources.items()
        )
        said.append(f"- divergence from {recipe.reference_path}: weight {weights}")
    return "## Training\n\n" + "\n".join(said) + "\n"


def _mixture(recipe: Recipe, inputs: RunInputs, last: Mapping[str, Any]) -> str:
    rows = []
    for name, source in recipe.sources.items():
        manifest = inputs.sources[name].manifest
        rows.append(
            [
                name,
                source.role,
                _said_share(source.share),
                *(
                    _percent(last.get(f"{key}/{name}"))
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


def _reproduction(recipe: Recipe) -> str:
    return (
        f"## How it was made\n\nMade with {versions()}:\n\n    deepspeed launch/train.py"
        f" recipe.yaml\n\nwith this recipe:\n\n```yaml\n{to_yaml(recipe).strip()}\n```\n"
    )


def _said_share(share: SourceShare) -> str:
    if isinstance(share, tuple):
        return ", ".join(f"{value:g} at step {step}" for step, value in share)
    return str(share)


def _percent(value: float | None) -> str:
    return "–" if value is None else f"{value:.2%}"


def _number(value: float | None, digits: int, sign: str = "") -> str:
    return "–" if value is None else f"{value:{sign}.{digits}f}"


def _with_interval(
    value: float | None, low: float | None, high: float | None, *, sign: str = ""
) -> str:
    said = _number(value, 4, sign)
    if low is None or high is None:
        return said
    return f"{said} ({_number(low, 4, sign)} to {_number(high, 4, sign)})"


LARGEST_GIB = 8.0  # of weights that are loaded a second time, beside what the run holds
_LONGEST_PROMPT, _SHORTEST_PROMPT, _CONTINUATION = 64, 8, 24  # tokens


@dataclass(frozen=True, kw_only=True, slots=True)
class GeneratedText:
    """A prompt and its most probable continuation; as text where the folder has a tokenizer, else
    as ids.
    """

    prompt: str
    continuation: str


def prompt_of(streams: Sequence[Stream]) -> Sequence[int]:
    """The beginning of the first document that can be read: of a chat up to its first answer, of a
    text its first tokens.
    """
    for stream in streams:
        try:
            row = stream.read(stream.in_shard_order()[0])
        except BigmixError:  # a shard that is out of reach is no reason to do without the check
            continue
        end = int(row.starts_P[1]) if len(row.starts_P) > 1 else row.num_tokens
        ids = row.ids_T[:end].tolist()
        in_loss = [at for at, label in enumerate(row.labels_T[:end].tolist()) if label != IGNORE]
        first = in_loss[0] + 1 if in_loss and in_loss[0] > 0 else _SHORTEST_PROMPT
        prompt: list[int] = ids[: min(first, end - 1)][-_LONGEST_PROMPT:]
        if prompt:
            return prompt
    return []


def size_gib(folder: Path) -> float:
    """The weights of a folder."""
    return sum(path.stat().st_size for path in folder.glob("*.safetensors")) / 2**30


def check_generation(folder: Path, prompt: Sequence[int]) -> GeneratedText:
    """Load a folder as any other program would, on the CPU, and let it go on from a prompt
    greedily.
    """
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype="auto").eval()
    room = max_positions(model.config) or _LONGEST_PROMPT + _CONTINUATION
    ids_BT = torch.tensor([list(prompt)])[:, : max(1, room - _CONTINUATION)]
    with torch.no_grad():
        made_BT = model.generate(
            ids_BT,
            attention_mask=torch.ones_like(ids_BT),
            max_new_tokens=min(_CONTINUATION, room - ids_BT.shape[1]),
            do_sample=False,
            pad_token_id=0,  # of one row nothing is padded; without it there is a warning
        )
    shown, new = ids_BT[0].tolist(), made_BT[0, ids_BT.shape[1] :].tolist()
    if not (folder / "tokenizer.json").is_file():
        return GeneratedText(prompt=str(shown), continuation=str(new))
    tokenizer = load_tokenizer(str(folder))
    return GeneratedText(prompt=tokenizer.decode(shown), continuation=tokenizer.decode(new))
