"""Terminal output: progress bars, tables, colours and number formats; plain lines in a file."""

import logging
import os
import sys
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TextIO, TypeAlias

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table as RichTable
from rich.text import Text

PLAIN_COLUMNS = 120  # a file has no width; tables in it are laid out for this one
REFRESHES_PER_S = 2
PLAIN_EVERY_S = 10
UNKNOWN = "–"  # in place of a number that is not known
GIB = 1 << 30


@dataclass(frozen=True, kw_only=True, slots=True)
class Change:
    """A difference in nats/token, for the colour: below 0 the model became better."""

    nats: float
    margin: float | None = None


Cell: TypeAlias = str | int | float | Change | None


@dataclass(frozen=True, kw_only=True, slots=True)
class Table:
    """Columns of text are aligned left, columns of numbers right; None is shown as a dash."""

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[Cell]]


@dataclass(frozen=True, kw_only=True, slots=True)
class HeldOutRow:
    """One source of one evaluation: losses and divergence in nats/token, None what was not
    measured. A margin is half of a 95 % interval.
    """

    source: str
    role: str
    loss: float
    loss_margin: float | None = None
    bits_per_byte: float | None = None
    token_accuracy: float | None = None
    kl_to_base: float | None = None
    forgetting: Change | None = None


class Terminal:
    """The screen of rank 0; with `enabled` False, on the other ranks, nothing is written.

    On a terminal there is one live bar. In a pipe, such as a Slurm log, each `every`-th step is one
    plain line.
    """

    def __init__(
        self,
        *,
        enabled: bool = True,
        every: int = 10,
        file: TextIO | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        file = file or sys.stdout
        # FORCE_COLOR would put escape codes into a log; rich recognises dumb terminals itself.
        console = Console(
            file=file, force_terminal=file.isatty(), highlight=False, quiet=not enabled
        )
        self._is_live = enabled and console.is_terminal and not console.is_dumb_terminal
        if not self._is_live:
            console.width = PLAIN_COLUMNS
        self._console = console
        self._every = every
        self._clock = clock
        self._first: tuple[int, float] | None = None  # step and time of the first report
        self._last = 0  # step of the last one
        self._live: Live | None = None

    def header(self, title: str, rows: Sequence[tuple[str, str]], sources: Table) -> None:
        """Say what is about to run: its title, settings as name and value, and its sources."""
        self._console.print(Text(title, style="bold"))
        settings = RichTable.grid(padding=(0, 2))
        settings.add_column(style="dim", no_wrap=True)
        settings.add_column(overflow="fold")
        for name, value in rows:
            settings.add_row(Text(name), Text(value))
        self._console.print(settings)
        self.table(sources)

    def progress(self, step: int, total: int, fields: Mapping[str, float | int | None]) -> None:
        """Show a step; `fields` has the keys of metrics.jsonl, of which the important ones are
        shown.
        """
        now = self._clock()
        if self._first is None or step < self._last:
            # The run begins, or has gone back.
            self._first = (step, now)
        self._last = step
        first_step, first_time = self._first
        done = step - first_step
        left_s = (now - first_time) / done * (total - step) if done else None
        if self._is_live:
            self._show(_bar(step, total, left_s, fields))
        elif step % self._every == 0 or step == total or done == 0:
            self._line(_plain_progress(step, total, left_s, fields))

    def counter(self, *names: str, total: int | None = None) -> Callable[..., None]:
        """A function to call with the counts so far: a live line, or in a pipe one line every ten
        seconds.

        The rates count from its first call, so that they are right where work goes on from an
        earlier run. With `total`, the time until the last count is as large is shown.
        """
        began = shown = self._clock()
        first: tuple[int, ...] = ()

        def show(*counts: int) -> None:
            nonlocal began, shown, first
            if not first:
                first, began = counts, self._clock()
            seconds = max(self._clock() - began, 1e-9)
            parts = [
                f"{n:,} {name} ({short((n - n0) / seconds)}/s)"
                for n, n0, name in zip(counts, first, names, strict=True)
            ]
            if total is not None:
                done, left = counts[-1] - first[-1], max(total - counts[-1], 0)
                parts.append(_eta(seconds / done * left if done else None))
            if self._is_live:
                self._show(Text("  ".join(parts)))
            elif self._clock() - shown >= PLAIN_EVERY_S:
                shown = self._clock()
                self._line("  ".join(parts))

        return show

    def note(self, text: str) -> None:
        """One line that is worth reading once."""
        self._line(text)

    def warning(self, text: str) -> None:
        """Something that the user should look at, while the run goes on."""
        self._line(f"warning: {text}", style="yellow")

    @property
    def has_colour(self) -> bool:
        """Whether styles can be seen; where not, signs must say what they would."""
        return self._console.color_system is not None and not self._console.no_color

    def styled(self, pieces: Sequence[tuple[str, str]]) -> None:
        """Text in pieces, each with its style in rich's words; long lines are folded by the
        screen.
        """
        self._console.print(Text.assemble(*pieces), soft_wrap=True)

    def table(self, table: Table) -> None:
        """Print a table; a wide cell is folded, never cut."""
        self._console.print(_rich_table(table))

    def close(self) -> None:
        """Leave the last state of the bar on the screen; a second call does nothing."""
        if self._live is not None:
            self._live.stop()
            self._live = None

    def _line(self, text: str, style: str = "") -> None:
        self._console.print(Text(text, style=style), soft_wrap=True)

    def _show(self, view: RenderableType) -> None:
        if self._live is None:
            self._live = Live(view, console=self._console, refresh_per_second=REFRESHES_PER_S)
            self._live.start()
        self._live.update(view)


def evaluation_table(title: str, results: Sequence[HeldOutRow]) -> Table:
    """The results of one evaluation, ready for `Terminal.table`; a column that nothing was measured
    for is left out.
    """
    columns: dict[str, list[Cell]] = {
        "source": [r.source for r in results],
        "role": [r.role for r in results],
        "loss": [f"{r.loss:.3f}{_margin(r.loss_margin)}" for r in results],
        "bits/byte": [r.bits_per_byte for r in results],
        "accuracy": [
            None if r.token_accuracy is None else percent(r.token_accuracy) for r in results
        ],
        "KL": [r.kl_to_base for r in results],
        "forgetting": [r.forgetting for r in results],
    }
    shown = {name: cells for name, cells in columns.items() if any(c is not None for c in cells)}
    return Table(
        title=f"{title} (nats/token, ± half of the 95 % interval)",
        columns=list(shown),
        rows=list(zip(*shown.values(), strict=True)),
    )


def _margin(margin: float | None) -> str:
    return "" if margin is None else f" ±{margin:.3f}"


def short(value: float, *, billion: str = "G") -> str:
    """A number with three digits: 1234567 becomes 1.23M; `billion` is the letter for 10^9."""
    for size, letter in ((1e9, billion), (1e6, "M"), (1e3, "k")):
        # From 999.5 on, three digits round up to the next unit.
        if abs(value) >= size * 0.9995:
            return f"{value / size:.3g}{letter}"
    return f"{value:.3g}"


def short_binary(value: int) -> str:
    """A power of two: 2048 becomes 2K."""
    for size, letter in ((1 << 20, "M"), (1 << 10, "K")):
        if value >= size:
            return f"{value // size}{letter}"
    return str(value)


def percent(part: float | None, decimals: int = 1) -> str:
    """A part of a whole: 0.456 becomes 45.6%; a dash where it is not known."""
    return UNKNOWN if part is None else f"{part:.{decimals}%}"


def share_percent(share: float | None) -> str:
    """A share as a sentence has it, with decimals only where it has them: 0.2 becomes 20 %.

    The space does not break, so that no line begins with the sign.
    """
    return "an unknown share" if share is None else f"{100 * share:.3g}\N{NO-BREAK SPACE}%"


def duration(seconds: float) -> str:
    """A time in its largest unit: 5400 becomes 1.5 hours."""
    for size, name in ((86400, "days"), (3600, "hours"), (60, "minutes")):
        if seconds >= size:
            return f"{seconds / size:.1f} {name}"
    return f"{seconds:.1f} seconds"


def clock_time(seconds: float) -> str:
    """A time as on a clock: 5400 becomes 1:30:00, and a day more 1d 1:30:00."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    days, hours = divmod(hours, 24)
    return f"{days}d " * (days > 0) + f"{hours}:{minutes:02}:{seconds:02}"


def gib(num_bytes: float, decimals: int = 1) -> str:
    """Bytes in GiB: 1.5 GiB."""
    return f"{num_bytes / GIB:,.{decimals}f} GiB"


def gib_or_mib(num_bytes: float) -> str:
    """Bytes in GiB, or in MiB where they are less than one GiB: 1.5 GiB, 20.0 MiB."""
    return gib(num_bytes) if num_bytes >= GIB else f"{num_bytes / 2**20:,.1f} MiB"


def quiet_third_party_logs() -> None:
    """Quieten transformers, deepspeed and torch.

    Call before they are imported: they read the environment once.
    """
    for name, value in _ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    for logger, level in _LEVELS.items():
        logging.getLogger(logger).setLevel(level)
    logging.getLogger("DeepSpeed").addFilter(_print_to_stderr)
    for module, message in _KNOWN_NOISE:
        warnings.filterwarnings("ignore", message=message, module=module)


def _print_to_stderr(record: logging.LogRecord) -> bool:
    """Print what is logged to stderr, and keep it from the logger's own handlers.

    DeepSpeed's handler writes to stdout, which is for the result of a command.
    """
    sys.stderr.write(_LOG_FORMAT.format(record) + "\n")
    return False


_LOG_FORMAT = logging.Formatter("[%(asctime)s] [%(levelname)s] [%(name)s] %(message)s")
_ENVIRONMENT = {
    "TRANSFORMERS_VERBOSITY": "error",
    "DATASETS_VERBOSITY": "error",
    "HF_HUB_VERBOSITY": "error",
    "TRANSFORMERS_NO_ADVISORY_WARNINGS": "1",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
    "TOKENIZERS_PARALLELISM": "false",  # else every forked loader process warns once
    "TORCH_CPP_LOG_LEVEL": "ERROR",
    "TF_CPP_MIN_LOG_LEVEL": "3",  # tensorboard's C++ parts
}
_LEVELS = {
    "DeepSpeed": logging.WARNING,
    "transformers": logging.ERROR,
    "datasets": logging.ERROR,
    "torch.distributed": logging.ERROR,
    "torch._dynamo": logging.ERROR,
    "matplotlib": logging.WARNING,
    "fsspec": logging.WARNING,
}
_KNOWN_NOISE = (
    (r"torch\.distributed.*", r".*barrier\(\).*using the device under current context.*"),
    (r"torch\.distributed.*", r".*_(all_gather|reduce_scatter)_base.*"),
    (r"torch\.nn\.modules.*", r".*Full backward hook is firing.*"),
    (r"torch\.utils\.checkpoint", r".*None of the inputs have requires_grad=True.*"),
    (r"torch\.optim\.lr_scheduler", r".*lr_scheduler\.step\(\)` before `optimizer\.step.*"),
    (r"(deepspeed|torch).*", r".*(pynvml package is deprecated|pkg_resources is deprecated).*"),
)


def _bar(
    step: int, total: int, left_s: float | None, fields: Mapping[str, float | int | None]
) -> RenderableType:
    top = RichTable.grid(padding=(0, 1), expand=True)
    top.add_column(ratio=1)
    for _ in range(3):
        top.add_column(no_wrap=True, justify="right")
    bar = ProgressBar(total=total, completed=step, complete_style="cyan", finished_style="green")
    count = f"{step:,}/{total:,}"
    top.add_row(bar, Text(count, style="bold"), Text(f"{step / total:.0%}"), Text(_eta(left_s)))
    lines = Text()
    for index, (name, value) in enumerate(_telling(fields)):
        # Non-breaking inside a pair, so that a narrow screen wraps between pairs only.
        lines.append("  " if index else "")
        lines.append(f"{name}\N{NO-BREAK SPACE}".replace(" ", "\N{NO-BREAK SPACE}"), style="dim")
        lines.append(value.replace(" ", "\N{NO-BREAK SPACE}"))
    return Group(top, lines)


def _plain_progress(
    step: int, total: int, left_s: float | None, fields: Mapping[str, float | int | None]
) -> str:
    count = f"{step:>{len(str(total))}}/{total}"
    numbers = "  ".join(f"{name} {value}" for name, value in _telling(fields))
    return f"step {count} {step / total:>4.0%}  {_eta(left_s)}  {numbers}"


def _telling(fields: Mapping[str, float | int | None]) -> Sequence[tuple[str, str]]:
    """The numbers that a person watches: losses first, then speed, then signs of trouble."""
    losses = [(k.removeprefix("loss/"), v) for k, v in fields.items() if k.startswith("loss/")]
    shown = [(name, UNKNOWN if value is None else f"{value:.3f}") for name, value in losses]
    if not losses and (loss := fields.get("loss")) is not None:
        shown.append(("loss", f"{loss:.3f}"))
    for key, (name, write) in _SHOWN.items():
        if (value := fields.get(key)) is not None:
            shown.append((name, write(value)))
    step_s, wait_s = fields.get("step_s"), fields.get("data_wait_s")
    if step_s and wait_s is not None:
        shown.append(("data wait", f"{wait_s / step_s:.0%}"))
    return shown


_SHOWN: Mapping[str, tuple[str, Callable[[float], str]]] = {
    "tokens_per_s": ("tokens/s", short),
    "mfu": ("MFU", percent),
    "lr": ("lr", lambda value: f"{value:.2e}"),
    "grad_norm": ("grad norm", lambda value: f"{value:.2f}"),
    "peak_gib": ("memory", lambda value: gib(value * GIB)),
}


def _eta(left_s: float | None) -> str:
    return "eta -:--:--" if left_s is None else f"eta {clock_time(left_s)}"


def _rich_table(table: Table) -> RichTable:
    rich_table = RichTable(
        title=Text(table.title), title_justify="left", title_style="bold", box=None, pad_edge=False
    )
    for index, name in enumerate(table.columns):
        is_text = all(_is_text(row[index]) for row in table.rows)
        rich_table.add_column(
            Text(name),
            justify="left" if is_text else "right",
            overflow="fold",
            header_style="dim",
        )
    for row in table.rows:
        rich_table.add_row(*map(_cell, row))
    return rich_table


def _is_text(cell: Cell) -> bool:
    """Words; a number with its unit, such as 25.0%, is none."""
    return isinstance(cell, str) and not cell[:1].isdigit()


def _cell(cell: Cell) -> Text:
    if cell is None:
        return Text(UNKNOWN, style="dim")
    if isinstance(cell, str):
        return Text(cell)
    if isinstance(cell, Change):
        text = f"{cell.nats:+.3f}{_margin(cell.margin)}"
        return Text(text, style="green" if cell.nats <= 0 else "red")
    return Text(f"{cell:,}" if isinstance(cell, int) else f"{cell:.3f}")
