"""Comparisons of a few runs with known numbers, which must be in what compare writes."""

import json
import math
import re
from argparse import ArgumentParser
from collections.abc import Mapping
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import yaml

from bigmix.commands.compare.charts.axes import spread, ticks
from bigmix.commands.compare.command import add_compare
from bigmix.commands.compare.report import compare
from bigmix.commands.compare.tables import tables
from bigmix.errors import BadInput

TASK_ROWS, ROW_TOKENS, STEPS = 8, 256, 60
BASE = {"docs": 4.1, "code": 1.6, "manual": 2.9}
EXTRA_LINES: list[Mapping[str, Any]] = []


def write_run(
    folder: Path,
    *,
    replay_share: float,
    base: Mapping[str, float] = BASE,
    steps: int = STEPS,
    extra_lines: list[Mapping[str, Any]] = EXTRA_LINES,
) -> Path:
    """A finished run: `docs` is the task, `code` the replay source, `manual` is only evaluated."""
    folder.mkdir(parents=True)
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe(folder, replay_share)))
    lines: list[Mapping[str, Any]] = [evaluation(0, replay_share, base)]
    for step in range(1, steps + 1):
        lines.append(training(step, replay_share))
        if step % 10 == 0 or step == steps:
            lines.append(evaluation(step, replay_share, base))
    lines += extra_lines
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def recipe(folder: Path, replay_share: float) -> dict[str, Any]:
    sources = {"docs": {"path": "data/docs", "role": "task", "share": 1.0 - replay_share}}
    if replay_share:
        sources["code"] = {"path": "data/code", "role": "replay", "share": replay_share}
    return {
        "model": {"path": "runs/base/export"},
        "sources": sources,
        "held_out": {"code": "data/code-test", "manual": "data/manual-test"},
        "budget": {"task_tokens": STEPS * TASK_ROWS * ROW_TOKENS, "steps": None},
        "train": {"lr": 1e-3, "steps": None},
        "behaviour": {"when": "auto"},  # the base is no chat model
        "output": str(folder),
    }


def training(step: int, replay_share: float) -> dict[str, Any]:
    line: dict[str, Any] = {"step": step, "loss": 2.0, "total_rows/docs": TASK_ROWS * step}
    line |= {
        "total_tokens/docs": TASK_ROWS * ROW_TOKENS * step,
        "total_loss_tokens/docs": TASK_ROWS * 64 * step,
        "gradient_share/docs": 1.0 - replay_share,
    }
    if replay_share:
        line |= {
            "total_rows/code": 2 * step,
            "total_tokens/code": 2 * ROW_TOKENS * step,
            "total_loss_tokens/code": 2 * ROW_TOKENS * step,
            "gradient_share/code": replay_share,
        }
    return line


def evaluation(step: int, replay_share: float, base: Mapping[str, float]) -> dict[str, Any]:
    """Losses that approach their ends: two-way forgets 0.2 of code where one-way forgets 1.2."""
    ends = {"docs": -1.8, "code": 0.2, "manual": 0.4}
    if not replay_share:
        ends = {"docs": -1.81, "code": 1.2, "manual": 0.9}
    line: dict[str, Any] = {"step": step, "eval": True}
    for name, end in ends.items():
        change = end * (1 - math.exp(-5 * step / STEPS)) / (1 - math.exp(-5))
        loss = base[name] + change
        line |= {
            f"held_out_loss/{name}": loss,
            f"bits_per_byte/{name}": loss / 3.2 / math.log(2),
            f"forgetting/{name}": change,
            f"held_out_low/{name}": loss - 0.03,
            f"held_out_high/{name}": loss + 0.03,
            f"forgetting_low/{name}": change - 0.02,
            f"forgetting_high/{name}": change + 0.02,
            f"held_out_tokens/{name}": 20_000,
            f"held_out_chat/{name}": False,
        }
    return line


@pytest.fixture
def two_runs(tmp_path: Path) -> list[Path]:
    return [
        write_run(tmp_path / "one-way", replay_share=0.0),
        write_run(tmp_path / "two-way", replay_share=0.2),
    ]


def test_summary_holds_kinds_losses_forgetting_and_gain(
    two_runs: list[Path], tmp_path: Path
) -> None:
    summary = compare(two_runs, tmp_path / "report")
    assert [path.name for path in summary.files] == [
        "index.html",
        "figure.png",
        "table.md",
        "table.tex",
        "summary.json",
    ]
    runs = json.loads((tmp_path / "report/summary.json").read_text())["runs"]
    kinds = {name: (run["kind"], run["steps"]) for name, run in runs.items()}
    assert kinds == {
        "base": ("base", 0),
        "one-way": ("one-way", STEPS),
        "two-way": ("two-way", STEPS),
    }
    code = runs["two-way"]["sources"]["code"]
    assert code["role"] == "replay"
    assert code["loss"] == pytest.approx(1.8)
    assert code["forgetting"] == pytest.approx(0.2)
    assert code["interval"] == pytest.approx([1.77, 1.83])
    assert code["perplexity"] == pytest.approx(math.exp(1.8))
    assert runs["base"]["sources"]["code"]["forgetting"] == 0
    assert runs["one-way"]["tasks"]["docs"] == pytest.approx({"loss": 2.29, "gain": 1.81})
    assert list(runs["one-way"]["tasks"]) == ["docs"]


def test_headline_says_what_was_kept_and_at_what_task_loss(
    two_runs: list[Path], tmp_path: Path
) -> None:
    comparison = compare(two_runs, tmp_path / "report").comparison
    assert (
        comparison.headline
        == "Two-way training kept 83 % of what one-way training lost on the text `code` (forgetting"
        " 0.20 against 1.20 nats/token) at about the same task loss (2.30 against 2.29)."
    )
    assert (
        comparison.detail
        == "Over all 2 text sources the mean forgetting is 0.30 against 1.05 nats/token."
    )


def test_headline_of_one_run_claims_no_comparison(tmp_path: Path) -> None:
    run = write_run(tmp_path / "a", replay_share=0.0)
    headline = compare([run], tmp_path / "report").comparison.headline
    assert (
        headline
        == "One-way training (a) forgot 1.20 nats/token on the text `code`, forgot 0.90 nats/token"
        " on the text `manual` and gained 1.81 nats/token on `docs`; no two-way run was given to"
        " compare it with."
    )


def test_shares_come_from_the_log_and_not_from_the_recipe(
    two_runs: list[Path], tmp_path: Path
) -> None:
    two_way = compare(two_runs, tmp_path / "report").comparison.runs[1]
    code = two_way.realised["code"]
    assert code.rows == pytest.approx(0.2)
    assert code.tokens == pytest.approx(0.2)
    assert code.loss_tokens == pytest.approx(0.5)
    assert code.gradient == pytest.approx(0.2)


class _References(HTMLParser):
    """Collects what a browser would load or open, and the visible text."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []
        self.text: list[str] = []
        self.tags: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        names = ("src", "href", "xlink:href", "srcset", "action", "data")
        self.found += [f"{tag} {name}={value}" for name, value in attrs if name in names]

    def handle_data(self, data: str) -> None:
        self.text.append(data)


def test_page_loads_nothing_and_shows_every_number_of_the_table(
    two_runs: list[Path], tmp_path: Path
) -> None:
    comparison = compare(two_runs, tmp_path / "report").comparison
    html = (tmp_path / "report/index.html").read_text(encoding="utf-8")
    markdown = (tmp_path / "report/table.md").read_text(encoding="utf-8")
    parser = _References()
    parser.feed(html)
    assert parser.found == []
    assert not re.search(r"https?:|url\(|@import|//", html)
    assert not {"script", "link", "iframe", "object", "img"} & set(parser.tags)
    texts = {text.strip() for text in parser.text}
    for table in tables(comparison):
        assert {table.name, table.role, *table.heads} <= texts
        for row in table.rows:
            assert {row.name, *(cell.value for cell in row.cells)} <= texts
            assert f"| {row.name} | {' | '.join(cell.text for cell in row.cells)} |" in markdown
    assert parser.tags.count("figure") == 3


def test_figure_is_a_picture_of_a_legible_size(two_runs: list[Path], tmp_path: Path) -> None:
    compare(two_runs, tmp_path / "report")
    header = (tmp_path / "report/figure.png").read_bytes()[:24]
    assert header[:8] == b"\x89PNG\r\n\x1a\n"
    assert int.from_bytes(header[16:20], "big") > 2000


def test_names_from_runs_are_escaped(tmp_path: Path) -> None:
    run = write_run(tmp_path / "<script>alert(1)</script>|x", replay_share=0.0)
    compare([run], tmp_path / "report")
    html = (tmp_path / "report/index.html").read_text()
    assert "<script>" not in html
    assert "&lt;script&gt;" in html


def test_equal_folder_names_differ_by_their_parents(tmp_path: Path) -> None:
    folders = [
        write_run(tmp_path / seed / name, replay_share=0.2)
        for seed, name in (("seed-1", "two"), ("seed-2", "two"), ("seed-1", "base"))
    ]
    names = [run.name for run in compare(folders, tmp_path / "report").comparison.runs]
    assert names == ["seed-1/two", "seed-2/two", "seed-1/base"]


def test_the_page_warns_of_another_base_and_of_other_task_tokens(tmp_path: Path) -> None:
    one = write_run(tmp_path / "one", replay_share=0.0)
    two = write_run(tmp_path / "two", replay_share=0.2, base={**BASE, "code": 1.7}, steps=64)
    warnings = compare([one, two], tmp_path / "report").comparison.warnings
    assert len(warnings) == 2
    assert "two does not start from the base" in warnings[0]
    assert "same number of task tokens" in warnings[1]
    assert (tmp_path / "report/index.html").read_text().count('class="warning"') == 2


def test_all_faults_of_all_runs_are_reported_at_once_and_nothing_is_written(tmp_path: Path) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    unfinished = write_run(tmp_path / "unfinished", replay_share=0.0, steps=31)
    corrupt = write_run(tmp_path / "corrupt", replay_share=0.0)
    (corrupt / "metrics.jsonl").write_text("{}\n")
    late = write_run(tmp_path / "late", replay_share=0.0, extra_lines=[training(STEPS + 1, 0.0)])
    silent = write_run(tmp_path / "silent", replay_share=0.0)
    (silent / "metrics.jsonl").write_text(json.dumps(training(STEPS, 0.0)) + "\n")
    with pytest.raises(BadInput) as caught:
        compare([empty, unfinished, corrupt, late, silent], tmp_path / "report")
    faults = "\n".join(caught.value.faults)
    for expected in (
        r"empty has no recipe.yaml",
        r"empty has no metrics.jsonl",
        r"unfinished has trained 63,488 of 122,880 task tokens",
        r"corrupt/metrics.jsonl:1 is",
        r"late has evaluations at steps: .*60; one after its last step, 61",
        r"silent has evaluations at steps: none; one at step 0",
    ):
        assert re.search(expected, faults), expected
    assert not (tmp_path / "report").exists()


def test_a_run_given_twice_is_a_fault(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="more than once"):
        compare([tmp_path, tmp_path / "x" / ".."], tmp_path / "report")


def test_command_prints_the_table_and_where_it_wrote(
    two_runs: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    parser = ArgumentParser()
    add_compare(parser.add_subparsers())
    out = tmp_path / "report"
    args = parser.parse_args(["compare", *map(str, two_runs), "--out", str(out)])
    assert args.func(args) == 0
    printed = capsys.readouterr().out
    assert "kept 83 %" in printed
    code = printed[printed.index("code (replay)") :]
    assert re.search(r"^one-way +[\d.]+ +\+1\.200 .*\n *two-way +[\d.]+ +\+0\.200 ", code, re.M)
    assert f"wrote {out / 'summary.json'}" in printed


def test_labels_are_spread_and_stay_inside() -> None:
    assert spread([10.0, 11.0, 50.0], 4.0, 0.0, 100.0) == [10.0, 14.0, 50.0]
    assert spread([99.0, 98.0], 4.0, 0.0, 100.0) == [100.0, 96.0]


@pytest.mark.parametrize(("low", "high"), [(0, 1), (-0.06, 1.27), (0, 122_880), (3.1, 3.1004)])
def test_ticks_are_few_round_and_inside(low: float, high: float) -> None:
    found = ticks(low, high, 5)
    assert 3 <= len(found) <= 7
    assert low - 1e-9 <= found[0] and found[-1] <= high + 1e-9
