"""The page of a comparison as a browser shows it: light and dark, wide and narrow."""

import os
from pathlib import Path

import pytest
from support.behaviour_runs import Answers, add_behaviour
from support.browser import Page, browser, find_browser
from support.run_folders import Numbers, Recipe, write_run, write_sweep

from bigmix.commands.compare.report import compare

WIDE, NARROW = 1280, 390

# The position and size of each figure, and its texts that are cut off.
FIGURES = """
[...document.querySelectorAll('figure svg')].map(svg => {
  const box = svg.getBoundingClientRect();
  const cut = [...svg.querySelectorAll('text:not(.tip)')].filter(text => {
    const own = text.getBoundingClientRect();
    return own.left < box.left - 1 || own.right > box.right + 1
        || own.top < box.top - 1 || own.bottom > box.bottom + 1;
  });
  const {left, right, width, height} = box;
  return {left, right, width, height, cut: cut.map(text => text.textContent)};
})
"""
# Texts of a figure that overlap by more than half of a line.
OVERLAPS = """
[...document.querySelectorAll('figure svg')].flatMap(svg => {
  const texts = [...svg.querySelectorAll('text:not(.tip)')];
  const boxes = texts.map(text => text.getBoundingClientRect());
  return boxes.flatMap((a, i) => boxes.slice(i + 1).map((b, j) => {
    const width = Math.min(a.right, b.right) - Math.max(a.left, b.left);
    const height = Math.min(a.bottom, b.bottom) - Math.max(a.top, b.top);
    const names = texts[i].textContent + ' over ' + texts[i + 1 + j].textContent;
    return width > 2 && height > a.height * 0.5 ? names : null;
  })).filter(text => text);
})
"""
# The least contrast of a text against the background, as WCAG 2 defines it.
CONTRAST = """
(() => {
  const light = colour => {
    const parts = colour.match(/[0-9.]+/g).slice(0, 3).map(part => part / 255);
    const [r, g, b] = parts.map(c => c <= 0.03928 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4);
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const paper = getComputedStyle(document.body).backgroundColor;
  const texts = [...document.querySelectorAll('svg text, p, h1, td span, small, summary, th')];
  const ratios = texts.map(text => {
    const style = getComputedStyle(text);
    const [a, b] = [light(text.closest('svg') ? style.fill : style.color), light(paper)];
    return (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
  });
  return Math.min(...ratios);
})()
"""


@pytest.fixture(scope="module")
def sweep_page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("comparison")
    write_sweep(folder / "sweep")
    compare([folder / "sweep"], folder / "report")
    return folder / "report/index.html"


@pytest.fixture(scope="module")
def pair_page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pair")
    write_run(folder / "one-way", Recipe(), Numbers(forgetting=1.1))
    write_run(folder / "two-way", Recipe(share=0.2), Numbers(forgetting=0.2))
    compare([folder / "one-way", folder / "two-way"], folder / "report")
    return folder / "report/index.html"


@pytest.fixture(scope="module")
def behaviour_page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("behaviour")
    for name, share, replay, kept in (
        ("one-way", 0.0, "books", 0.05),
        ("two-way-books", 0.25, "books", 0.1),
        ("two-way-chats", 0.25, "self", 0.95),
    ):
        numbers = Numbers(forgetting=0.4 - share)
        run = write_run(folder / name, Recipe(share=share, replay=replay), numbers)
        add_behaviour(run, Answers(forgetting=2.3 * (1 - kept), kept=kept))
    compare([folder], folder / "report")
    return folder / "report/index.html"


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory):
    if find_browser() is None:
        # Where a Chromium must be installed, a missing one is a fault.
        assert os.environ.get("BIGMIX_NEEDS_CHROMIUM") != "1", "no Chromium is on PATH"
        pytest.skip("no Chromium on this machine; on a Debian: apt-get install chromium")
    with browser(tmp_path_factory.mktemp("profile")) as page:
        yield page


@pytest.mark.slow
@pytest.mark.parametrize("width", [WIDE, NARROW])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_all_figures_are_visible_and_nothing_is_loaded_from_the_network(
    sweep_page: Path,
    pair_page: Path,
    behaviour_page: Path,
    page: Page,
    scheme: str,
    width: int,
    tmp_path: Path,
) -> None:
    for file, num_figures in ((sweep_page, 14), (pair_page, 7), (behaviour_page, 20)):
        page.requests.clear()
        page.open(file, width=width, scheme=scheme)
        assert page.requests == [file.as_uri()]
        assert page.errors == []
        figures = page.value(FIGURES)
        assert len(figures) == num_figures
        for figure in figures:
            assert figure["width"] > 300 and figure["height"] > 200
            assert figure["left"] >= 0 and figure["right"] <= width
            assert figure["cut"] == []
        assert page.value(OVERLAPS) == []
        assert page.value(CONTRAST) >= 4.5
        assert page.value("document.documentElement.scrollWidth") <= width
        page.screenshot(tmp_path / "page.png")
        assert (tmp_path / "page.png").stat().st_size > 50_000


@pytest.mark.slow
def test_a_long_name_leaves_room_for_the_numbers_on_a_phone(page: Page, tmp_path: Path) -> None:
    name = "lr-1e-4_objective-per_token_web-0.25_weight-decay-0.1"
    write_run(tmp_path / name, Recipe(share=0.25), Numbers(forgetting=0.2))
    compare([tmp_path / name], tmp_path / "report")
    page.open(tmp_path / "report/index.html", width=NARROW, scheme="light")
    scrolled = page.value(
        "[...document.querySelectorAll('.results')].filter(t => t.offsetWidth >"
        " t.parentNode.offsetWidth).map(t => t.querySelector('tbody th').offsetWidth)"
    )
    assert scrolled and max(scrolled) < NARROW / 2
    assert page.value("document.documentElement.scrollWidth") <= NARROW


@pytest.mark.slow
def test_the_colours_follow_the_scheme(pair_page: Path, page: Page) -> None:
    papers = []
    for scheme in ("light", "dark"):
        page.open(pair_page, width=WIDE, scheme=scheme)
        papers.append(page.value("getComputedStyle(document.body).backgroundColor"))
    assert papers == ["rgb(255, 255, 255)", "rgb(20, 23, 27)"]


@pytest.mark.slow
def test_the_keyboard_reaches_marks_and_wide_tables(sweep_page: Path, page: Page) -> None:
    page.open(sweep_page, width=NARROW, scheme="light")
    reached = set()
    for _ in range(150):
        for kind in ("keyDown", "keyUp"):
            page.call(
                "Input.dispatchKeyEvent", type=kind, key="Tab", code="Tab", windowsVirtualKeyCode=9
            )
        reached.add(page.value("document.activeElement.getAttribute('class')"))
    assert {"point", "wide"} <= reached
    tip = "document.querySelector('.point:focus .tip')"
    page.value("document.querySelector('.point').focus()")
    assert page.value(f"getComputedStyle({tip}).opacity") == "1"


@pytest.mark.slow
def test_the_page_shows_first_what_was_lost_and_the_answers_that_show_it(
    behaviour_page: Path, page: Page
) -> None:
    page.open(behaviour_page, width=WIDE, scheme="light")
    lost = "Two-way training (two-way-books) lost the base's behaviour"
    assert page.value("document.querySelector('h1').textContent").startswith(lost)
    # The numbers are smaller than what is claimed, and the first table is the verdicts.
    sizes = page.value(
        "['h1', 'h1 small'].map(s => parseFloat(getComputedStyle("
        "document.querySelector(s)).fontSize))"
    )
    assert sizes[0] > 1.2 * sizes[1]
    first = page.value("document.querySelector('table').innerText")
    assert "two-way-chats" in first and "lost (instructions followed" in first
    # All tables fit a wide window.
    scrolled = "[...document.querySelectorAll('.wide')].filter(w => w.scrollWidth > w.clientWidth)"
    assert page.value(f"{scrolled}.map(w => w.getAttribute('aria-label'))") == []
    opened = page.value("[...document.querySelectorAll('details[open]')].map(d => d.innerText)")
    assert opened and "does not follow the constraints" in opened[0]
    assert all(name in opened[0] for name in ("base", "one-way", "two-way-chats"))
