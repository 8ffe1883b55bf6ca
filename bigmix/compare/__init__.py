"""Folders of runs go in; out come a page, pictures, tables and a summary of what they kept and learned."""

import json
from collections.abc import Sequence
from pathlib import Path

from bigmix.compare.curves import curve_scenes
from bigmix.compare.figure import draw_figure
from bigmix.compare.frontier import frontier_scene, frontiers
from bigmix.compare.judge import Summary, judge
from bigmix.compare.law_chart import law_scenes
from bigmix.compare.page import Pictures, page
from bigmix.compare.read import read_runs
from bigmix.compare.styles import MAX_NAMED, styles_of
from bigmix.compare.summary import summary_tree
from bigmix.compare.table import latex, markdown
from bigmix.files import replace_text

__all__ = ["Summary", "compare"]


def compare(runs: Sequence[Path], out: Path) -> Summary:
    """Write `index.html, figure.png, table.md, table.tex, summary.json` into `out`; the summary goes last.

    `frontier.png` and `law.png` are added where there are enough points for them. Raises BadInput with the faults of all
    runs before anything is written.
    """
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
        "summary.json": json.dumps(summary_tree(comparison, found), indent=2, allow_nan=False)
        + "\n",
    }
    out.mkdir(parents=True, exist_ok=True)
    files = {
        "figure.png": pictures.curves,
        "frontier.png": pictures.frontiers,
        "law.png": pictures.laws,
    }
    drawn = {name: scenes for name, scenes in files.items() if scenes}
    for name, scenes in drawn.items():
        # The law has its shares on the axis, and few curves have their names at their ends.
        is_named = name == "law.png" or (
            name == "figure.png" and len(comparison.points) <= MAX_NAMED
        )
        draw_figure(scenes, styles_of(comparison), out / name, with_legend=not is_named)
    for name, text in texts.items():
        replace_text(out / name, text)
    written = ["index.html", *drawn, "table.md", "table.tex", "summary.json"]
    return Summary(comparison=comparison, files=[out / name for name in written])
