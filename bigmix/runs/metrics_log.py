"""Writes the numbers of each step to metrics.jsonl and to TensorBoard, and reads the file back."""

import json
import math
import re
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

from bigmix.errors import BadInput
from bigmix.files import atomic_write

METRICS = "metrics.jsonl"
TENSORBOARD = "tensorboard"
FLUSH_EVERY_S = 5.0

Number: TypeAlias = float | int | bool | None
MetricsRecord: TypeAlias = dict[str, Number]

# TensorBoard puts tags that agree up to the first slash into one group of charts. Numbers of a
# source come as `loss/web`, which is such a tag; the numbers of the whole step get a group here.
_GROUPS = {
    "step_s": "time",
    "data_wait_s": "time",
    "save_wait_s": "time",
    "forward_s": "time",
    "backward_s": "time",
    "optimizer_s": "time",
    "tokens_per_s": "speed",
    "mfu": "speed",
    "peak_gib": "speed",
    "behaviour_prompts": "behaviour",
    "behaviour_constrained": "behaviour",
    "behaviour_tokens": "behaviour",
}
_NOT_CHARTED = ("step", "eval")
_HELD_OUT = {
    "held-out loss": "held_out_loss",
    "forgetting": "forgetting",
    "bits per byte": "bits_per_byte",
    "token accuracy": "token_accuracy",
    "last-word accuracy": "last_word_accuracy",
    "KL to the base": "kl_to_base",
}
_PARTS_OF_STEP = ("step_s", "data_wait_s", "forward_s", "backward_s", "optimizer_s")
_SHARES = {
    "share of rows": "share_rows",
    "share of tokens": "share_tokens",
    "share of loss tokens": "share_loss_tokens",
    "share of the gradient": "gradient_share",
}


class RunLog:
    """Appends to `metrics.jsonl` and `tensorboard/` in the folder of a run.

    `resume_step` is the last step that is already trained. What was logged after it is deleted, so
    that file and charts become those of a run that was never interrupted. None starts a new log.
    """

    def __init__(
        self,
        folder: Path,
        *,
        sources: Sequence[str],
        held_out: Sequence[str],
        resume_step: int | None,
    ) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._folder = folder
        self._held_out = tuple(held_out)
        self._layout = _layout(sources, held_out)
        self._open(resume_step)

    def _open(self, resume_step: int | None) -> None:
        # SummaryWriter imports torch, which takes seconds and is not needed to read metrics.jsonl.
        from torch.utils.tensorboard import SummaryWriter

        path = self._folder / METRICS
        if resume_step is not None:
            _delete_lines(path, after_step=resume_step)
        self._file = path.open("w" if resume_step is None else "a", encoding="utf-8")
        _wait_for_later_name(self._folder / TENSORBOARD)
        # Purging from step 0 hides the points of an earlier run whose event files are in the same
        # folder.
        purge_step = 0 if resume_step is None else resume_step + 1
        self._writer: Any = SummaryWriter(str(self._folder / TENSORBOARD), purge_step=purge_step)
        self._writer.add_custom_scalars(self._layout)
        self._writer.flush()
        self._flushed_at = time.monotonic()

    def go_back(self, step: int) -> None:
        """Delete what was logged after a step, which is now the last that is trained."""
        self.close()
        self._open(step)

    def write(self, line: Mapping[str, Number]) -> None:
        """Append the numbers of one step, `line["step"]`.

        None and numbers that are not finite become null in the file and are not charted.
        """
        numbers = finite(line)
        self._file.write(json.dumps(numbers, allow_nan=False) + "\n")
        self._file.flush()
        for key, value in numbers.items():
            if value is not None and key not in _NOT_CHARTED:
                self._writer.add_scalar(tag_of(key), value, line["step"])
        if line.get("eval") or time.monotonic() - self._flushed_at > FLUSH_EVERY_S:
            self._writer.flush()
            self._flushed_at = time.monotonic()

    def describe(self, recipe_yaml: str, hparams: Mapping[str, str | float | int | bool]) -> None:
        """Show the recipe as text, and the run in TensorBoard's table of hyperparameters."""
        from torch.utils.tensorboard.summary import hparams as hparams_records

        self._writer.add_text("recipe", _as_markdown_code(recipe_yaml), 0)
        named = {k: str(v).lower() if isinstance(v, bool) else v for k, v in hparams.items()}
        metrics = [
            f"{kind}/{s}" for kind in ("held_out_loss", "forgetting") for s in self._held_out
        ]
        # add_hparams would open a second event file, and TensorBoard would then drop later points.
        tags = dict.fromkeys([*metrics, tag_of("loss"), tag_of("tokens_per_s")], 0.0)
        for record in hparams_records(named, tags):
            self._writer.file_writer.add_summary(record, 0)
        self._writer.flush()

    def show_text(self, tag: str, text: str, step: int) -> None:
        """Show a text in Markdown next to the charts."""
        self._writer.add_text(tag, text, step)
        self._writer.flush()

    def flush(self) -> None:
        """Flush TensorBoard's file: what a checkpoint counts as logged is not logged again."""
        self._writer.flush()

    def close(self) -> None:
        """Flush and close both; a second call does nothing."""
        self._file.close()
        self._writer.close()


def finite(line: Mapping[str, Number]) -> dict[str, Number]:
    """The line with None in place of numbers that are not finite, which JSON cannot hold."""
    return {key: _finite(value) for key, value in line.items()}


def tag_of(key: str) -> str:
    """TensorBoard's tag for a key of metrics.jsonl.

    `step_s` becomes `time/step_s`, and `loss/web` stays. The ends of intervals have a group of
    their own: `forgetting_low/web` becomes `intervals/forgetting_low/web`.
    """
    if key.split("/")[0].endswith(("_low", "_high")):
        return f"intervals/{key}"
    return key if "/" in key else f"{_GROUPS.get(key, 'train')}/{key}"


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The lines of a metrics.jsonl, without a last line that was cut off when the run died.

    Raises BadInput where any other line is not a JSON object with a step.
    """
    return [line for line, _ in _lines(path)]


def has_evaluation(path: Path, step: int) -> bool:
    """Whether a metrics.jsonl has the line of the evaluation after a step."""
    return evaluation_at(path, step) is not None


def evaluation_at(path: Path, step: int) -> dict[str, Any] | None:
    """The line of the evaluation after a step in a metrics.jsonl; None if it has none."""
    lines = read_lines(path) if path.exists() else ()
    return next((n for n in lines if n["step"] == step and n.get("eval") is True), None)


def _lines(path: Path) -> Iterator[tuple[dict[str, Any], bytes]]:
    """Each line, parsed and as bytes."""
    with path.open("rb") as file:
        for number, raw in enumerate(file, start=1):
            # Only a last line can lack its newline: it was being written when the run died.
            if not raw.endswith(b"\n"):
                return
            line = _parse(raw)
            if line is None:
                raise BadInput(
                    f"{path}:{number} is {raw[:60]!r}; each line must be a JSON object with a whole"
                    " number `step`; restore the file from a copy, or delete that line"
                )
            yield line, raw


def _parse(raw: bytes) -> dict[str, Any] | None:
    try:
        line = json.loads(raw)
    except ValueError:  # JSONDecodeError and UnicodeDecodeError are both ValueErrors
        return None
    return line if isinstance(line, dict) and type(line.get("step")) is int else None


def _delete_lines(path: Path, *, after_step: int) -> None:
    """Rewrite the file without the lines after a step and without a last line that was cut off."""
    if not path.exists():
        return
    with atomic_write(path) as temporary, temporary.open("wb") as file:
        file.writelines(raw for line, raw in _lines(path) if line["step"] <= after_step)


def _wait_for_later_name(folder: Path) -> None:
    """Wait until the name of a new event file sorts after the names of those in the folder.

    TensorBoard reads the files in the order of their names, which hold the second of their making.
    Of two files of the same second the older may come last, and what the newer purges would show.
    """
    seconds = [path.name.split(".")[3] for path in folder.glob("events.out.tfevents.*.*")]
    newest = max((int(second) for second in seconds if second.isdigit()), default=0)
    while newest == int(time.time()):
        time.sleep(0.02)


def _finite(value: Number) -> Number:
    return value if value is None or math.isfinite(value) else None


def _layout(
    sources: Sequence[str], held_out: Sequence[str]
) -> dict[str, dict[str, tuple[str, list[str]]]]:
    """The charts of several lines, as `add_custom_scalars` takes them."""
    learning = {
        "training loss": _lines_of([f"loss/{s}" for s in sources]),
    } | {title: _lines_of([f"{key}/{s}" for s in held_out]) for title, key in _HELD_OUT.items()}
    bands = {f"forgetting of {s}, with its 95 % interval": _band("forgetting", s) for s in held_out}
    shares = {title: _lines_of([f"{key}/{s}" for s in sources]) for title, key in _SHARES.items()}
    speed = {"time of a step by part": _lines_of([tag_of(key) for key in _PARTS_OF_STEP])}
    return {"learning": learning, "forgetting": bands, "realised shares": shares, "speed": speed}


def _lines_of(tags: Sequence[str]) -> tuple[str, list[str]]:
    # TensorBoard takes these tags as regular expressions and matches the beginning of a tag with
    # them: `loss/a` would also draw `loss/ab`.
    return "Multiline", [f"{re.escape(tag)}$" for tag in tags]


def _band(key: str, source: str) -> tuple[str, list[str]]:
    """A line between the ends of its interval; here TensorBoard takes the tags literally."""
    return "Margin", [tag_of(f"{key}{end}/{source}") for end in ("", "_low", "_high")]


def _as_markdown_code(text: str) -> str:
    """Indent by four spaces, since the text itself could end a fenced block."""
    return "\n".join("    " + line for line in text.splitlines())
