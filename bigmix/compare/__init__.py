"""Folders of runs go in; out come a page, a picture, a table and a summary of what they kept and learned."""

import json
from collections.abc import Sequence
from pathlib import Path

from bigmix.compare.chart import panels
from bigmix.compare.figure import draw_figure
from bigmix.compare.judge import Summary, judge
from bigmix.compare.page import page
from bigmix.compare.read import read_runs
from bigmix.compare.table import markdown, summary_tree
from bigmix.files import replace_text

__all__ = ["Summary", "compare"]


def compare(runs: Sequence[Path], out: Path) -> Summary:
    """Write `index.html, figure.png, table.md, summary.json` into `out`; the summary goes last.

    Raises BadInput with the faults of all runs before anything is written.
    """
    comparison = judge(read_runs(runs))
    drawn = panels(comparison)
    out.mkdir(parents=True, exist_ok=True)
    draw_figure(drawn, out / "figure.png")
    texts = {
        "index.html": page(comparison, drawn, out),
        "table.md": markdown(comparison),
        "summary.json": json.dumps(summary_tree(comparison), indent=2, allow_nan=False) + "\n",
    }
    for name, text in texts.items():
        replace_text(out / name, text)
    written = ["index.html", "figure.png", "table.md", "summary.json"]
    return Summary(comparison=comparison, files=[out / name for name in written])
