"""Compares finished runs, and writes the page, the pictures, the tables and the summary."""

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from bigmix.commands.compare.charts.curves import curve_scenes
from bigmix.commands.compare.charts.figure import MAX_COLUMNS, draw_figure, unknown_letters
from bigmix.commands.compare.charts.frontier import frontier_scene, frontiers
from bigmix.commands.compare.charts.law_chart import law_scenes
from bigmix.commands.compare.charts.styles import are_labels_enough, styles_of
from bigmix.commands.compare.judge import Comparison, judge
from bigmix.commands.compare.measures import BEHAVIOUR
from bigmix.commands.compare.page import Pictures, page
from bigmix.commands.compare.read import read_runs
from bigmix.commands.compare.summary import summary_tree
from bigmix.commands.compare.tables import latex, markdown
from bigmix.errors import BadInput
from bigmix.files import replace_text


@dataclass(frozen=True, kw_only=True, slots=True)
class Summary:
    """What `compare` found and the files that it wrote.

    `unknown_letters` are letters of names that no installed font has, which are boxes in the PNGs.
    """

    comparison: Comparison
    files: Sequence[Path]
    unknown_letters: str


def compare(runs: Sequence[Path], out: Path) -> Summary:
    """Write `index.html, figure.png, table.md, table.tex, summary.json` into `out`, the summary
    last.

    `frontier.png` and `law.png` are added where there are enough points for them. Raises BadInput
    with the faults of all runs, or that of `out`, before anything is written.
    """
    _check_writable(out)
    comparison = judge(read_runs(runs))
    found = frontiers(comparison)
    pictures = Pictures(
        frontiers=[frontier_scene(comparison, frontier) for frontier in found],
        laws=law_scenes(comparison),
        curves=curve_scenes(comparison),
    )
    texts = {
        "index.html": page(comparison, pictures, given=runs, out=out),
        "table.md": markdown(comparison),
        "table.tex": latex(comparison),
        "summary.json": (
            json.dumps(summary_tree(comparison, found), indent=2, allow_nan=False) + "\n"
        ),
    }
    out.mkdir(parents=True, exist_ok=True)
    files = {
        "figure.png": pictures.curves,
        "frontier.png": pictures.frontiers,
        "law.png": pictures.laws,
    }
    styles = styles_of(comparison)
    drawn = {name: scenes for name, scenes in files.items() if scenes}
    for name in files.keys() - drawn.keys():
        # It may be left of an earlier comparison, which had enough points.
        (out / name).unlink(missing_ok=True)
    for name, scenes in drawn.items():
        # The shares of a law are on its axis, and curves that are few have names at their ends.
        is_named = name == "law.png" or (name == "figure.png" and are_labels_enough(styles))
        # Frontiers against text and against behaviour are side by side.
        is_paired = name == "frontier.png" and any(f.replay == BEHAVIOUR for f in found)
        columns = 2 if is_paired else MAX_COLUMNS
        draw_figure(scenes, styles, out / name, columns=columns, with_legend=not is_named)
    for name, text in texts.items():
        replace_text(out / name, text)
    written = ["index.html", *drawn, "table.md", "table.tex", "summary.json"]
    return Summary(
        comparison=comparison,
        files=[out / name for name in written],
        unknown_letters=unknown_letters(point.name for point in comparison.points),
    )


def _check_writable(out: Path) -> None:
    path = out.absolute()
    nearest = next(each for each in (path, *path.parents) if each.exists())
    if not nearest.is_dir() or not os.access(nearest, os.W_OK):
        why = "is not writable" if nearest.is_dir() else "is not a folder"
        raise BadInput(f"--out is {out}, and {nearest} {why}; give another folder")
