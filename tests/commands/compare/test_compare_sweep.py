"""Comparisons of many runs: points over seeds, lines over the share, frontiers and the law."""

import json
import math
import statistics
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml
from support.run_folders import (
    ALPHA,
    AT_ZERO,
    B,
    Numbers,
    Recipe,
    around,
    law,
    write_evaluation,
    write_run,
    write_sweep,
)

from bigmix.commands.compare.charts.axes import place_labels
from bigmix.commands.compare.charts.figure import unknown_letters
from bigmix.commands.compare.charts.frontier import frontiers
from bigmix.commands.compare.charts.law_chart import law_rows
from bigmix.commands.compare.charts.styles import labels_of
from bigmix.commands.compare.charts.svg import width_of
from bigmix.commands.compare.judge import judge
from bigmix.commands.compare.law import Fit, LawPoint, fit_law, fit_source
from bigmix.commands.compare.measures import spread_of
from bigmix.commands.compare.points import arrange, points_of
from bigmix.commands.compare.read import read_runs
from bigmix.commands.compare.report import Summary, compare
from bigmix.commands.compare.sections import budget_sentences
from bigmix.errors import BadInput
from bigmix.evaluation.bootstrap import Estimate

SHARES = (0.0, 0.01, 0.05, 0.25)


@pytest.fixture(scope="module")
def sweep(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_sweep(tmp_path_factory.mktemp("sweep") / "sweep", shares=SHARES)


def final_loss(folder: Path, source: str) -> float:
    line = (folder / "metrics.jsonl").read_text().splitlines()[-1]
    return json.loads(line)[f"held_out_loss/{source}"]


def test_runs_that_differ_in_seed_and_output_alone_are_one_point(sweep: Path) -> None:
    points = points_of(read_runs([sweep]).runs)
    assert {point.name: len(point.runs) for point in points} == {
        "average-0.5": 1,
        "books-0": 3,
        "books-0.01": 3,
        "books-0.05": 3,
        "books-0.25": 3,
        "ema-0.999": 1,
        "kl-1": 1,
        "lr-1e-4": 1,
        "lr-3e-4": 1,
        "self-replay": 1,
    }
    assert {point.name: point.share for point in points if len(point.runs) > 1} == pytest.approx(
        {f"books-{share:g}": share for share in SHARES}
    )


def test_a_point_has_mean_and_deviation_of_its_seeds_and_students_interval(sweep: Path) -> None:
    point = next(p for p in points_of(read_runs([sweep]).runs) if p.name == "books-0.05")
    found = point.source("books", "held_out_loss")
    assert found is not None
    values = [final_loss(sweep / f"books-0.05/seed-{seed}", "books") for seed in range(3)]
    assert found.values == values
    assert found.mean == pytest.approx(statistics.mean(values))
    assert found.deviation == pytest.approx(statistics.stdev(values))
    half = 4.303 * statistics.stdev(values) / math.sqrt(3)
    assert found.interval == pytest.approx((found.mean - half, found.mean + half))


def test_a_single_run_keeps_its_own_interval() -> None:
    found = spread_of([Estimate(value=2.0, low=1.5, high=2.25)])
    assert (found.mean, found.deviation, found.interval) == (2.0, None, (1.5, 2.25))


def test_shares_are_a_line_and_points_that_differ_otherwise_are_not(sweep: Path) -> None:
    arrangement = arrange(points_of(read_runs([sweep]).runs))
    assert [[p.name for p in line.points] for line in arrangement.lines] == [
        [f"books-{share:g}" for share in SHARES]
    ]
    assert sorted(p.name for p in arrangement.remedies) == [
        "average-0.5",
        "ema-0.999",
        "kl-1",
        "lr-1e-4",
        "lr-3e-4",
        "self-replay",
    ]


def test_shares_under_another_setting_are_a_line_of_their_own(tmp_path: Path) -> None:
    for objective in ("per_source", "per_token"):
        for share in SHARES[: 4 if objective == "per_source" else 3]:
            recipe = Recipe(share=share, more={"objective": objective})
            write_run(tmp_path / f"{objective}-{share:g}", recipe, Numbers(forgetting=law(share)))
    arrangement = arrange(points_of(read_runs([tmp_path]).runs))
    assert [(line.name, len(line.points)) for line in arrangement.lines] == [
        ("", 4),
        ("objective per_token", 3),
    ]
    assert arrangement.remedies == []


def test_the_law_that_made_the_numbers_is_found() -> None:
    points = [
        LawPoint(share=share, forgetting=law(share), relative_error=0.01)
        for share in (0.01, 0.05, 0.1, 0.5)
    ]
    found = fit_law(AT_ZERO, points)
    assert (found.B, found.alpha) == pytest.approx((B, ALPHA), rel=1e-3)
    by_two = fit_law(AT_ZERO, points[:2])
    assert by_two.predict(0.5) == pytest.approx(law(0.5), rel=1e-3)


def test_the_law_is_the_best_of_a_search_over_both_constants() -> None:
    measured = {0.01: 0.775, 0.05: 0.418, 0.1: 0.288, 0.25: 0.135, 0.5: 0.035}
    points = [LawPoint(share=s, forgetting=f, relative_error=0.02 + s) for s, f in measured.items()]

    def miss(b: float, alpha: float) -> float:
        logs = (
            math.log(1.106) - alpha * math.log1p(b * p.share) - math.log(p.forgetting)
            for p in points
        )
        return sum((log / p.relative_error) ** 2 for log, p in zip(logs, points, strict=True))

    found = fit_law(1.106, points)
    best = min(
        miss(10 ** (b / 50), alpha / 100) for b in range(-100, 200) for alpha in range(20, 400)
    )
    assert miss(found.B, found.alpha) <= best * (1 + 1e-6)


def test_a_share_with_one_seed_has_the_largest_relative_error_of_the_others() -> None:
    measured = {0.0: (1.0, 1.1), 0.05: (0.5, 0.6), 0.25: (0.29, 0.3), 0.5: (0.2,)}
    spreads = {p: spread_of([Estimate(value=v) for v in values]) for p, values in measured.items()}
    points = [
        SimpleNamespace(share=share, source=lambda *_, at=share: spreads[at]) for share in measured
    ]
    errors = [point.relative_error for point in fit_source(points, "books").points]  # type: ignore
    assert errors[3] == errors[1] == max(errors) == pytest.approx(0.05 / 0.55)
    assert errors[2] == pytest.approx(0.005 / 0.295)


def test_left_out_points_are_predicted_with_their_errors(sweep: Path) -> None:
    fit = judge(read_runs([sweep])).fits["books"]
    assert isinstance(fit, Fit)
    assert [p.share for p in fit.leave_one_out] == pytest.approx([0.01, 0.05, 0.25])
    assert [p.share for p in fit.from_smallest] == pytest.approx([0.25])
    assert all(abs(p.error) < 0.1 for p in fit.leave_one_out)
    measured = [row[1][0] for row in law_rows(fit)]
    assert measured == [f"{point.forgetting:.3f}" for point in fit.points]


def test_two_shares_are_too_few_for_a_law(tmp_path: Path) -> None:
    for share in (0.0, 0.1):
        write_run(tmp_path / f"{share}", Recipe(share=share), Numbers(forgetting=law(share)))
    refused = judge(read_runs([tmp_path])).fits["books"]
    assert isinstance(refused, str)
    assert "there are 1 and 1" in refused


def test_a_share_that_forgets_nothing_is_left_out_of_the_law_and_listed(tmp_path: Path) -> None:
    ends = {0.0: 1.1, 0.05: 0.4, 0.1: 0.2, 0.5: -0.1}
    for share, end in ends.items():
        write_run(tmp_path / f"{share}", Recipe(share=share), Numbers(forgetting=end))
    fit = judge(read_runs([tmp_path])).fits["books"]
    assert isinstance(fit, Fit)
    assert fit.passed_over == pytest.approx([0.5])
    assert len(fit.points) == 3


def test_a_point_is_dominated_where_another_is_at_least_as_good_in_both(sweep: Path) -> None:
    comparison = judge(read_runs([sweep]))
    found = frontiers(comparison)
    assert [frontier.x_label for frontier in found] == [
        "task loss, nats/token",
        "task loss, nats/token",
        "exact match",
        "accuracy",
        "macro f1",
    ]
    for frontier in found:
        sign = 1 if frontier.better == "lower" else -1
        costs = [(sign * s.task.mean, s.forgetting.mean) for s in frontier.spots]
        for spot, (task, forgetting) in zip(frontier.spots, costs, strict=True):
            better = [
                c for c in costs if c[0] <= task and c[1] <= forgetting and c != (task, forgetting)
            ]
            assert spot.is_dominated == bool(better)
    dominated = {spot.point.name for spot in found[0].spots if spot.is_dominated}
    assert {"lr-3e-4", "kl-1", "average-0.5"} <= dominated


@pytest.fixture(scope="module")
def summary(sweep: Path, tmp_path_factory: pytest.TempPathFactory) -> Summary:
    return compare([sweep], tmp_path_factory.mktemp("out") / "report")


def test_files_of_a_sweep(summary: Summary) -> None:
    report = summary.files[0].parent
    assert [path.name for path in summary.files] == [
        "index.html",
        "figure.png",
        "frontier.png",
        "law.png",
        "table.md",
        "table.tex",
        "summary.json",
    ]
    tree = json.loads((report / "summary.json").read_text())
    assert tree["version"] == 2
    assert len(tree["runs"]) == 3 * len(SHARES) + 6 + 1  # and the base
    assert tree["runs"]["books-0.05/seed-1"]["point"] == "books-0.05"
    point = tree["points"]["books-0.05"]
    assert point["sources"]["books"]["forgetting"]["mean"] == pytest.approx(law(0.05), rel=0.05)
    assert len(point["scores"]["gsm8k"]["exact_match"]["values"]) == 3
    assert tree["laws"]["books"]["B"] > 0
    assert tree["headline"].startswith("Without replay training forgot 1.1")
    page = (report / "index.html").read_text()
    for run in summary.comparison.runs:
        assert run.command in page.replace("&#39;", "'")
    assert "Task tokens are fixed: replay comes on top" in page
    tex = (report / "table.tex").read_text()
    assert r"{books-0.05} & {5~\%}" in tex
    assert tex.count(r"\begin{tabular}") == tex.count(r"\end{tabular}") == 7


def test_the_same_example_is_shown_for_all_points(summary: Summary) -> None:
    page = summary.files[0].read_text()
    first = page.split("<summary>Question: Mona has 5 apples")[1].split("</details>")[0]
    for name in ("base", "books-0", "books-0.25", "ema-0.999"):
        assert f"{name}</th>" in first
    assert "How many has she <now>" not in page
    assert "The first 6 of 8 examples that were kept" in page
    assert "characters more" in page


def test_an_unfinished_run_of_a_sweep_is_left_out_with_the_reason(tmp_path: Path) -> None:
    for share in SHARES:
        write_run(tmp_path / f"s/{share}", Recipe(share=share), Numbers(forgetting=law(share)))
    write_run(tmp_path / "s/half", Recipe(share=0.4), Numbers(forgetting=0.1), steps=200)
    waiting = tmp_path / "s/waiting"
    waiting.mkdir()
    (waiting / "recipe.yaml").write_text("sources: {}\n")
    comparison = judge(read_runs([tmp_path / "s"]))
    assert len(comparison.runs) == 4
    (warning,) = comparison.warnings
    assert warning.startswith("2 results in the given folders are left out, 4 are compared")
    assert "half has trained 409,600 of 819,200 task tokens" in warning
    assert "waiting has no metrics.jsonl" in warning
    with pytest.raises(BadInput, match="half has trained"):
        read_runs([tmp_path / "s/half"])


def test_a_model_evaluated_outside_of_a_run_is_a_point_without_a_curve(tmp_path: Path) -> None:
    write_run(tmp_path / "one-way", Recipe(), Numbers(forgetting=1.1))
    for name, weight in (("average-0.5", 0.3), ("average-0.9", 0.8)):
        write_evaluation(
            tmp_path / name, Recipe(), Numbers(forgetting=weight), model=f"runs/{name}"
        )
    comparison = compare([tmp_path], tmp_path / "report").comparison
    assert [point.name for point in comparison.points] == ["average-0.5", "average-0.9", "one-way"]
    average = comparison.points[0]
    found = average.source("books", "forgetting")
    assert found is not None and found.mean == pytest.approx(0.3)
    assert average.runs[0].command.startswith(
        "bigmix evaluate recipe.yaml --model runs/average-0.5"
    )
    assert "evaluated once outside of a run: 2." in (tmp_path / "report/index.html").read_text()


def test_the_log_of_a_run_says_what_its_evaluated_model_was_trained_on(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", Recipe(share=0.2), Numbers(forgetting=0.2))
    folder = write_evaluation(
        tmp_path / "again",
        Recipe(share=0.2),
        Numbers(forgetting=0.2),
        model=str(run / "export"),
    )
    again, trained = (read_runs([path]).runs[0] for path in (folder, run))
    assert again.task_tokens == trained.task_tokens == again.final.task_tokens
    assert again.realised == trained.realised


def test_an_evaluation_without_a_base_says_what_to_do(tmp_path: Path) -> None:
    folder = write_evaluation(
        tmp_path / "e", Recipe(), Numbers(forgetting=0.2), model="m", with_base=False
    )
    with pytest.raises(BadInput, match="evaluate again with --base"):
        read_runs([folder])


def test_samples_may_hold_any_line_end_and_a_damaged_one_is_named(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", Recipe(), Numbers(forgetting=1.0))
    path = run / "samples/gsm8k/step-000400.jsonl"
    lines = [json.loads(line) for line in path.read_text().split("\n")[:-1]]
    lines[0]["outputs"] = ["one\u2028two\x0bthree"]
    path.write_text("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))
    (found,) = read_runs([run]).runs
    assert found.samples[400]["gsm8k"][0].outputs == ["one\u2028two\x0bthree"]
    path.write_text('{"prompt": 1}\n')
    with pytest.raises(BadInput, match=r"step-000400.jsonl:1 is"):
        read_runs([run])


@pytest.mark.parametrize(
    ("budget", "words"),
    [
        ({"task_tokens": 819_200}, "replay comes on top"),
        ({"total_tokens": 819_200}, "Total tokens are fixed"),
        ({"steps": 400}, "Steps are fixed"),
    ],
)
def test_the_budget_is_named(tmp_path: Path, budget: dict[str, int], words: str) -> None:
    whole = {"task_tokens": None, "total_tokens": None, "steps": None} | budget
    for share in (0.0, 0.2):
        recipe = Recipe(share=share, more={"budget": whole})
        write_run(tmp_path / f"{share}", recipe, Numbers(forgetting=0.5))
    (sentence,) = budget_sentences(points_of(read_runs([tmp_path]).runs))
    assert words in sentence


def test_what_recipes_share_and_where_they_differ(tmp_path: Path) -> None:
    write_run(tmp_path / "a", Recipe(), Numbers(forgetting=1.0))
    write_run(tmp_path / "b", Recipe(share=0.2), Numbers(forgetting=0.2))
    compare([tmp_path], tmp_path / "report")
    differ, common = (
        (tmp_path / "report/index.html")
        .read_text()
        .split("How the recipes differ</h2>")[1]
        .split("settings in common")
    )
    for key in ("sources.books", "sources.books.share", "sources.gsm8k.share"):
        assert f"<code>{key}</code>" in differ
    # Held out are the same folders, whether the source is trained or not.
    for key in ("held_out.books", "train.lr"):
        assert f"<code>{key}</code>" not in differ and f"<code>{key}</code>" in common


@pytest.mark.slow
def test_a_hundred_runs_are_compared(tmp_path: Path) -> None:
    for index in range(100):
        recipe = Recipe(share=index / 200, seed=index)
        write_run(
            tmp_path / f"{index}", recipe, Numbers(forgetting=law(index / 200)), samples=False
        )
    comparison = judge(read_runs([tmp_path]))
    assert len(comparison.points) == 100
    assert [p.share for p in comparison.arrangement.main] == pytest.approx(
        [index / 200 for index in range(100)]
    )


def test_labels_do_not_overlap() -> None:
    points = [(100.0, 100.0), (104.0, 102.0), (98.0, 104.0), (102.0, 98.0)]
    bounds = (0.0, 0.0, 300.0, 200.0)
    obstacles = [(x - 5, y - 5, x + 5, y + 5) for x, y in points]
    placed = place_labels([(at, 36.0) for at in points], obstacles, bounds)
    for index, (x, y) in enumerate(placed):
        assert 0 <= x <= 300 and 0 <= y <= 200
        for other_x, other_y in placed[index + 1 :]:
            assert abs(x - other_x) > 30 or abs(y - other_y) > 11


def test_an_older_runs_log_without_further_measures_is_read(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", Recipe(), Numbers(forgetting=1.0), samples=False)
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    kept = ("held_out", "total_", "gradient_share", "step", "eval", "loss")
    lines = [{k: v for k, v in line.items() if k.startswith(kept)} for line in lines]
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (found,) = read_runs([run]).runs
    measures = found.final.sources["books"]
    assert set(measures) == {"held_out_loss", "perplexity", "forgetting", "gain"}
    assert measures["forgetting"].interval is None


def test_a_recipe_of_seeds_far_apart_has_one_curve(tmp_path: Path) -> None:
    recipe = Recipe(share=0.1)
    for seed in (0, 7):
        write_run(tmp_path / f"run-{seed}", replace(recipe, seed=seed), Numbers(forgetting=0.3))
    (point,) = points_of(read_runs([tmp_path]).runs)
    assert point.name == "run"
    steps = [[e.step for e in evaluations] for evaluations in point.shared_steps()]
    assert steps[0] == [0, 0] and steps[-1] == [400, 400]


def test_averages_of_the_seeds_are_one_point_and_no_one_way_run(tmp_path: Path) -> None:
    for seed in (1, 2):
        for name, share in (("books-0", 0.0), ("books-0.2", 0.2)):
            recipe = Recipe(share=share, seed=seed)
            folder = write_run(
                tmp_path / f"{name}/seed-{seed}", recipe, Numbers(forgetting=law(share))
            )
        write_evaluation(
            tmp_path / f"a/seed-{seed}/half",
            Recipe(seed=seed),
            Numbers(forgetting=0.5),
            model=str(folder / "average"),
        )
    comparison = judge(read_runs([tmp_path]))
    assert {p.name: len(p.runs) for p in comparison.points} == {
        "half": 2,
        "books-0": 2,
        "books-0.2": 2,
    }
    assert comparison.headline.startswith("Two-way training (books-0.2) kept")
    assert "one-way training (books-0)" in comparison.headline


def test_folders_of_a_run_are_not_searched_and_those_of_the_user_are(tmp_path: Path) -> None:
    run = write_run(tmp_path / "log/run", Recipe(), Numbers(forgetting=1.0))
    copied = run / "checkpoints/step-000400/recipe.yaml"
    copied.parent.mkdir(parents=True)
    copied.write_text("sources: {}\n")
    found = read_runs([tmp_path])
    assert [r.folder for r in found.runs] == [run] and not found.left_out


def test_a_run_and_the_evaluation_of_its_export_are_not_shown_twice(tmp_path: Path) -> None:
    run = write_run(tmp_path / "s/run", Recipe(), Numbers(forgetting=1.0))
    own = write_evaluation(
        run / "evaluation", Recipe(), Numbers(forgetting=1.0), model=str(run / "export")
    )
    found = read_runs([tmp_path / "s"])
    assert [r.folder for r in found.runs] == [run]
    assert found.left_out == [f"{own} evaluates the export of a run that is compared too"]
    assert len(read_runs([run, own]).runs) == 2


def edit_lines(folder: Path, edit) -> None:
    """Change the lines of a run's log in place."""
    path = folder / "metrics.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    for line in lines:
        edit(line)
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


def edit_recipe(folder: Path, edit) -> None:
    path = folder / "recipe.yaml"
    recipe = yaml.safe_load(path.read_text())
    edit(recipe)
    path.write_text(yaml.safe_dump(recipe))


@pytest.mark.parametrize(
    ("names", "points"),
    [
        (("x-1", "x-2", "x", "one"), {"x", "x-1", "one"}),
        (("base-1", "base-2", "two", "one"), {"base-1", "two", "one"}),
    ],
)
def test_no_two_points_have_one_name(
    tmp_path: Path, names: tuple[str, ...], points: set[str]
) -> None:
    recipes = (Recipe(share=0.05), Recipe(share=0.05, seed=1), Recipe(share=0.25), Recipe())
    for name, recipe in zip(names, recipes, strict=True):
        write_run(tmp_path / name, recipe, Numbers(forgetting=law(recipe.share)))
    found = points_of(read_runs([tmp_path / name for name in names]).runs)
    assert {point.name for point in found} == points
    assert sorted(len(point.runs) for point in found) == [1, 1, 2]


def test_a_run_that_repeats_a_seed_is_not_a_further_seed(tmp_path: Path) -> None:
    for name in ("a", "a-again"):
        write_run(tmp_path / name, Recipe(share=0.05), Numbers(forgetting=0.4))
    write_run(tmp_path / "b", Recipe(share=0.05, seed=1), Numbers(forgetting=0.4))
    comparison = judge(read_runs([tmp_path]))
    assert [len(point.runs) for point in comparison.points] == [2, 1]
    assert comparison.points[1].source("books", "forgetting").deviation is None
    assert any("not a further seed of a." in warning for warning in comparison.warnings)


def test_an_evaluated_model_has_the_recipe_that_it_was_trained_with(tmp_path: Path) -> None:
    write_run(tmp_path / "one", Recipe(seed=3), Numbers(forgetting=1.1))
    model = tmp_path / "one/export"
    write_evaluation(
        tmp_path / "evaluated", Recipe(share=0.25), Numbers(forgetting=1.1), model=str(model)
    )
    (run,) = read_runs([tmp_path / "evaluated"]).runs
    assert (run.kind, run.replay_share, run.seed) == ("one-way", 0.0, 3)


@pytest.mark.parametrize("forgetting", [(0.393,), (1.10, 1.42)])
def test_what_each_seed_certainly_forgot_was_lost(
    tmp_path: Path, forgetting: tuple[float, ...]
) -> None:
    """However wide the interval of the loss over documents is, or that of a mean over two seeds."""
    for seed, value in enumerate(forgetting):
        one = write_run(tmp_path / f"one-{seed}", Recipe(seed=seed), Numbers(forgetting=value))
        edit_lines(one, lambda line: line.update(around("held_out", "books", 3.5, 0.5)))
        write_run(tmp_path / f"two-{seed}", Recipe(share=0.25, seed=seed), Numbers(forgetting=0.05))
    headline = judge(read_runs([tmp_path])).headline
    assert "kept" in headline and "of what one-way training lost on `books`" in headline


def test_a_run_that_ends_where_a_source_is_used_up_is_finished(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", Recipe(share=0.25), Numbers(forgetting=0.1))

    def stops(recipe: dict) -> None:
        recipe["budget"] = {"steps": 1000}
        recipe["sources"]["gsm8k"]["when_exhausted"] = "stop"

    edit_recipe(run, stops)
    with pytest.raises(BadInput, match="400 of 1,000 steps"):
        read_runs([run])
    (run / "export").mkdir()
    assert read_runs([run]).runs[0].num_steps == 400


def test_a_run_that_lacks_a_few_steps_is_not_finished(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", Recipe(), Numbers(forgetting=0.1))
    edit_recipe(run, lambda recipe: recipe.update(budget={"steps": 410}))
    with pytest.raises(BadInput, match="400 of 410 steps"):
        read_runs([run])


def test_a_run_that_diverged_is_not_reported_as_not_evaluated(tmp_path: Path) -> None:
    write_run(tmp_path / "one", Recipe(), Numbers(forgetting=1.1))
    for name, sources in {
        "two": ("books",),
        "three": ("books", "gsm8k", "banking77", "wiki"),
    }.items():
        run = write_run(tmp_path / name, Recipe(share=len(sources) / 10), Numbers(forgetting=0.1))

        def diverge(line: dict, gone: tuple[str, ...] = sources) -> None:
            if line.get("eval") and line["step"]:
                line.update({f"held_out_loss/{source}": None for source in gone})

        edit_lines(run, diverge)
    summary = compare([tmp_path], tmp_path / "report")
    warned = " ".join(summary.comparison.warnings)
    assert "two has no finite loss on `books` at step 400" in warned
    assert "three has no finite loss on `wiki` at step 400" in warned
    assert "not evaluated" not in warned


def test_other_held_out_data_is_not_reported_as_another_base(tmp_path: Path) -> None:
    write_run(tmp_path / "one", Recipe(), Numbers(forgetting=1.1))
    two = write_run(tmp_path / "two", Recipe(share=0.25), Numbers(forgetting=0.1))

    def other(line: dict) -> None:
        if line.get("eval"):
            line["held_out_documents/books"] = 17
            line["held_out_loss/books"] += 0.3

    edit_lines(two, other)
    (warning,) = judge(read_runs([tmp_path])).warnings
    assert "two was evaluated on other held-out data of `books` than one: 17 documents" in warning


def test_runs_are_found_through_links(tmp_path: Path) -> None:
    write_run(tmp_path / "elsewhere/one", Recipe(), Numbers(forgetting=1.1))
    write_run(tmp_path / "runs/two", Recipe(share=0.25), Numbers(forgetting=0.1))
    (tmp_path / "runs/one").symlink_to(tmp_path / "elsewhere/one")
    (tmp_path / "runs/round").symlink_to(tmp_path / "runs")
    assert {run.name for run in read_runs([tmp_path / "runs"]).runs} == {"one", "two"}


def test_seeds_that_end_at_other_steps_have_their_ends_on_the_curve(tmp_path: Path) -> None:
    for seed, steps in enumerate((400, 360)):
        write_run(tmp_path / f"a-{seed}", Recipe(seed=seed), Numbers(forgetting=1.0), steps=steps)
        edit_recipe(tmp_path / f"a-{seed}", lambda recipe: recipe.update(budget={}))
    (point,) = points_of(read_runs([tmp_path]).runs)
    assert [e.step for e in point.shared_steps()[-1]] == [400, 360]


def test_the_law_is_on_the_page_where_no_task_was_evaluated(tmp_path: Path) -> None:
    write_sweep(tmp_path / "sweep", shares=SHARES, seeds=1)
    for run in (tmp_path / "sweep").glob("books-*/seed-0"):

        def without(line: dict) -> None:
            for key in [k for k in line if "gsm8k" in k or "banking77" in k]:
                if line.get("eval"):
                    del line[key]

        edit_lines(run, without)
    given = sorted((tmp_path / "sweep").glob("books-*/seed-0"))
    compare(given, tmp_path / "report")
    assert (tmp_path / "report/law.png").is_file()
    assert not (tmp_path / "report/frontier.png").exists()
    assert "Forgetting over replay's share" in (tmp_path / "report/index.html").read_text()
    compare(given[:2], tmp_path / "report")
    assert not (tmp_path / "report/law.png").exists()


@pytest.mark.parametrize(
    "edit",
    [
        lambda recipe: recipe.update(sources={"a": "data/x"}),
        lambda recipe: recipe.update(seed="abc"),
        lambda recipe: recipe.update(budget=3),
    ],
)
def test_a_malformed_recipe_is_named(tmp_path: Path, edit) -> None:
    run = write_run(tmp_path / "run", Recipe(), Numbers(forgetting=1.1))
    edit_recipe(run, edit)
    with pytest.raises(BadInput, match=r"run: recipe\.yaml or metrics\.jsonl is not as bigmix"):
        read_runs([run])


def test_an_output_that_cannot_be_written_is_reported_first(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(BadInput, match="--out is .*file"):
        compare([tmp_path / "nothing"], tmp_path / "file")


def test_long_names_keep_the_words_in_which_they_differ() -> None:
    assert labels_of(["gsm8k-qwen-one-way-lr1e-5", "gsm8k-qwen-two-way-lr1e-5"]) == {
        "gsm8k-qwen-one-way-lr1e-5": "one-way-lr1e-5",
        "gsm8k-qwen-two-way-lr1e-5": "two-way-lr1e-5",
    }
    assert labels_of(["books-0.05", "one"]) == {"books-0.05": "books-0.05", "one": "one"}


def test_letters_that_no_font_has_are_found(tmp_path: Path) -> None:
    assert unknown_letters(["ascii", "café"]) == ""
    assert unknown_letters(["\U0003134a", "a"]) == "\U0003134a"  # the last letter of Unicode's Han
    assert width_of("单向") > width_of("ab")
