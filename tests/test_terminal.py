"""What the screen and the log of a run look like, at the widths that people have."""

import io
import logging
import os
import re
import subprocess
import sys
import warnings

import pytest

from bigmix.terminal import (
    Cell,
    Change,
    HeldOutRow,
    Table,
    Terminal,
    clock_time,
    duration,
    evaluation_table,
    gib,
    gib_or_mib,
    percent,
    quiet_third_party_logs,
    share_percent,
    short,
    short_binary,
)

SIX = ("web", "books", "wikipedia", "code", "gsm8k-chat", "instructions")


class Screen(io.StringIO):
    """A terminal as far as rich can see."""

    def isatty(self) -> bool:
        return True


def fields(step: int) -> dict[str, float | int | None]:
    losses = {f"loss/{name}": 2.0 + 1.0 / step for name in SIX}
    speed = {"tokens_per_s": 123_456.0, "mfu": 0.412, "step_s": 2.0, "data_wait_s": 0.02}
    return {**losses, **speed, "lr": 2e-5, "grad_norm": None}


def run(terminal: Terminal, steps: int) -> None:
    rows: list[list[Cell]] = [[name, "replay", "text", 1 / 6, 12_345_678] for name in SIX]
    sources = Table(title="sources", columns=["name", "role", "kind", "share", "rows"], rows=rows)
    terminal.header("two-way", [("model", "runs/base/export"), ("budget", "100 steps")], sources)
    for step in range(1, steps + 1):
        terminal.progress(step, 100, fields(step))
    terminal.close()


def test_a_pipe_gets_one_plain_line_every_few_steps() -> None:
    out = io.StringIO()
    times = iter(range(0, 10_000, 36))
    run(Terminal(file=out, every=10, clock=lambda: next(times)), 100)
    text = out.getvalue()
    assert "\r" not in text and "\x1b" not in text
    lines = [line for line in text.splitlines() if line.startswith("step")]
    assert len(lines) == 11  # the first step, then each tenth
    assert lines[1].startswith("step  10/100  10%  eta 0:54:00  web 2.100  books 2.100")
    for name in SIX:
        assert f"{name} 2.100" in lines[1]
    assert lines[1].endswith("tokens/s 123k  MFU 41.2%  lr 2.00e-05  data wait 1%")
    assert "eta -:--:--" in lines[0]
    assert "eta 0:00:00" in lines[-1]


def test_the_time_that_is_left_is_counted_anew_where_the_run_goes_back() -> None:
    out = io.StringIO()
    times = iter([0, 1, 2, 8, 9])
    terminal = Terminal(file=out, every=1, clock=lambda: next(times))
    for step in (410, 411, 412, 405, 406):
        terminal.progress(step, 1000, fields(step))
    terminal.close()
    shown = [line.split("eta ")[1].split()[0] for line in out.getvalue().splitlines()]
    assert shown == ["-:--:--", "0:09:49", "0:09:48", "-:--:--", "0:09:54"]


def test_forced_colour_does_not_reach_a_log(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    out = io.StringIO()
    terminal = Terminal(file=out)
    terminal.warning("disk is 95 % full")
    assert out.getvalue() == "warning: disk is 95 % full\n"


@pytest.mark.parametrize("columns", [80, 120])
def test_a_screen_shows_bar_losses_speed_and_time_within_its_width(
    monkeypatch: pytest.MonkeyPatch, columns: int
) -> None:
    monkeypatch.setenv("COLUMNS", str(columns))
    monkeypatch.setenv("TERM", "xterm-256color")
    screen = Screen()
    run(Terminal(file=screen), 50)
    plain = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", screen.getvalue()).replace("\xa0", " ")
    last = plain[plain.rindex("50/100") - 60 :]
    assert "50%" in last and "eta" in last and "tokens/s 123k" in last
    for name in SIX:
        assert f"{name} 2.020" in last
    assert max(map(len, re.split(r"[\r\n]", plain))) <= columns


def test_other_ranks_print_nothing() -> None:
    for out in (io.StringIO(), Screen()):
        terminal = Terminal(enabled=False, file=out)
        run(terminal, 3)
        terminal.note("a")
        terminal.warning("b")
        terminal.table(Table(title="t", columns=["a"], rows=[["1"]]))
        assert out.getvalue() == ""


def test_brackets_are_text_and_not_markup() -> None:
    out = io.StringIO()
    terminal = Terminal(file=out)
    terminal.note("shard [bold]7[/bold] of [/data]")
    terminal.table(Table(title="[t]", columns=["[c]"], rows=[["[red]x"]]))
    assert "shard [bold]7[/bold] of [/data]\n" in out.getvalue()
    assert "[red]x" in out.getvalue() and "[c]" in out.getvalue()


def test_a_long_line_of_a_log_is_not_folded() -> None:
    out = io.StringIO()
    Terminal(file=out).note("x " * 200)
    assert out.getvalue().count("\n") == 1


@pytest.mark.parametrize("columns", [80, 120])
def test_evaluation_shows_loss_interval_and_coloured_forgetting(
    monkeypatch: pytest.MonkeyPatch, columns: int
) -> None:
    monkeypatch.setenv("COLUMNS", str(columns))
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.delenv("NO_COLOR", raising=False)
    results = [
        HeldOutRow(
            source=name,
            role="replay",
            loss=2.5,
            loss_margin=0.1,
            bits_per_byte=0.9,
            token_accuracy=0.456,
            kl_to_base=0.125,
            forgetting=Change(nats=sign * 0.25, margin=0.0125),
        )
        for name, sign in zip(SIX, (1, -1, 1, 1, 1, 1), strict=True)
    ]
    screen = Screen()
    Terminal(file=screen).table(evaluation_table("held out, step 1,200", results))
    text = screen.getvalue()
    assert "held out, step 1,200" in text and "2.500 ±0.100" in text and "45.6%" in text
    assert re.search(r"\x1b\[31m *\+0\.250 ±0\.013", text)
    assert re.search(r"\x1b\[32m *-0\.250 ±0\.013", text)
    assert len(text.splitlines()) == 2 + len(SIX)  # nothing is folded
    without = [HeldOutRow(source="web", role="replay", loss=2.5)]
    table = evaluation_table("held out", without)
    assert table.columns == ["source", "role", "loss"]
    assert table.rows == [("web", "replay", "2.500")]


def test_taming_keeps_what_the_user_set_and_quietens_the_rest(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(os, "environ", {"TRANSFORMERS_VERBOSITY": "debug"})
    with warnings.catch_warnings():
        quiet_third_party_logs()
    assert os.environ["TRANSFORMERS_VERBOSITY"] == "debug"
    assert os.environ["TOKENIZERS_PARALLELISM"] == "false"
    assert logging.getLogger("DeepSpeed").level == logging.WARNING
    assert logging.getLogger("transformers").level == logging.ERROR


def test_taming_imports_none_of_the_libraries() -> None:
    code = (
        "import sys; from bigmix.terminal import quiet_third_party_logs as quiet; quiet();"
        "sys.exit(bool({'torch', 'deepspeed', 'transformers', 'datasets'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_deepspeed_logs_to_stderr() -> None:
    """stdout is for the result of a command, such as the JSON of `bigmix plan --json`."""
    code = (
        "from bigmix.terminal import quiet_third_party_logs as quiet; quiet();"
        "import deepspeed; deepspeed.utils.logger.warning('slow')"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120
    )
    assert done.stdout == ""
    assert done.stderr.endswith("[WARNING] [DeepSpeed] slow\n")


def test_numbers_are_short_and_have_their_unit() -> None:
    assert [short(value) for value in (0.5, 999.4, 999.6, 1_234_567, -2.5e9)] == [
        "0.5",
        "999",
        "1k",
        "1.23M",
        "-2.5G",
    ]
    assert short(2.5e9, billion="B") == "2.5B"
    assert [short_binary(value) for value in (512, 2048, 1 << 20)] == ["512", "2K", "1M"]
    assert [percent(0.456), percent(0.456, 0), percent(None)] == ["45.6%", "46%", "–"]
    assert share_percent(0.125) == "12.5\N{NO-BREAK SPACE}%"
    assert [duration(seconds) for seconds in (5, 90, 5400, 2 * 86400)] == [
        "5.0 seconds",
        "1.5 minutes",
        "1.5 hours",
        "2.0 days",
    ]
    assert [clock_time(59.6), clock_time(90_061)] == ["0:01:00", "1d 1:01:01"]
    assert [gib(3 << 29), gib(1 << 41, 2)] == ["1.5 GiB", "2,048.00 GiB"]
    assert gib_or_mib(20 << 20) == "20.0 MiB"


def test_a_counter_shows_rates_and_the_time_that_is_left() -> None:
    out = io.StringIO()
    now = [0.0]
    terminal = Terminal(file=out, clock=lambda: now[0])
    count = terminal.counter("conversations", "tokens", total=2_000)
    count(10, 1_000)
    now[0] = 20.0
    count(14, 1_400)
    count(14, 1_500)  # within ten seconds of the line before
    now[0] = 40.0
    count(20, 2_000)
    assert out.getvalue().splitlines() == [
        "14 conversations (0.2/s)  1,400 tokens (20/s)  eta 0:00:30",
        "20 conversations (0.25/s)  2,000 tokens (25/s)  eta 0:00:00",
    ]
