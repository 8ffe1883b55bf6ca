"""What a run logs is read back from its file, and with TensorBoard's own reader."""

import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.backend.event_processing.event_multiplexer import EventMultiplexer
from tensorboard.plugins.custom_scalar import layout_pb2
from tensorboard.plugins.hparams import plugin_data_pb2

from bigmix.errors import BadInput
from bigmix.runs.metrics_log import RunLog, read_lines, tag_of

NAN = float("nan")


def log(folder: Path, steps: Iterable[int], *, resume_step: int | None = None) -> None:
    run_log = RunLog(
        folder, sources=["web", "web.2"], held_out=["web", "code"], resume_step=resume_step
    )
    run_log.describe("seed: 1\n", {"lr": 1e-4, "objective": "per_source", "two_way": True})
    for step in steps:
        run_log.write(line_of(step))
        if step % 5 == 0:
            run_log.write(
                {
                    "step": step,
                    "eval": True,
                    "held_out_loss/code": 9.0 - step,
                    "forgetting/code": 0.5,
                    "forgetting_low/code": 0.25,
                }
            )
    run_log.close()


def line_of(step: int) -> dict[str, Any]:
    return {
        "step": step,
        "loss": 1.0 / step,
        "step_s": 0.5,
        "loss/web": float(step),
        "loss/web.2": 2.0,
        "gradient_share/web": 0.25,
        "mfu": None,
        "skipped": False,
    }


def events(folder: Path) -> EventAccumulator:
    reader = EventAccumulator(
        str(folder / "tensorboard"), size_guidance={"scalars": 0, "tensors": 0}
    )
    return reader.Reload()


def points(folder: Path, tag: str) -> list[tuple[int, float]]:
    return [(event.step, event.value) for event in events(folder).Scalars(tag)]


def test_the_file_and_tensorboard_hold_the_same_numbers(tmp_path: Path) -> None:
    log(tmp_path, range(1, 11))
    lines = read_lines(tmp_path / "metrics.jsonl")
    training = [line for line in lines if "eval" not in line]
    assert training == [line_of(step) for step in range(1, 11)]
    for key in ("loss", "step_s", "loss/web", "gradient_share/web", "skipped"):
        steps, values = zip(*points(tmp_path, tag_of(key)), strict=True)
        assert steps == tuple(range(1, 11))
        assert values == pytest.approx([float(line[key]) for line in training])
    assert points(tmp_path, "held_out_loss/code") == [(5, 4.0), (10, -1.0)]


def test_numbers_that_are_missing_or_not_finite_are_null_and_not_charted(tmp_path: Path) -> None:
    run_log = RunLog(tmp_path, sources=["web"], held_out=[], resume_step=None)
    run_log.write({"step": 1, "loss": NAN, "grad_norm": float("inf"), "mfu": None, "lr": 1.0})
    run_log.close()
    text = (tmp_path / "metrics.jsonl").read_text()
    assert json.loads(text) == {"step": 1, "loss": None, "grad_norm": None, "mfu": None, "lr": 1.0}
    assert events(tmp_path).Tags()["scalars"] == ["train/lr"]


def test_a_line_is_on_disk_as_soon_as_it_is_written(tmp_path: Path) -> None:
    run_log = RunLog(tmp_path, sources=["web"], held_out=[], resume_step=None)
    run_log.write({"step": 1, "loss": 2.0})
    assert read_lines(tmp_path / "metrics.jsonl") == [{"step": 1, "loss": 2.0}]
    run_log.write({"step": 1, "eval": True, "held_out_loss/web": 2.0})
    assert points(tmp_path, "held_out_loss/web") == [(1, 2.0)]
    run_log.close()
    run_log.close()


@pytest.mark.parametrize("resume_step", [0, 4, 7, 10])
def test_a_resumed_log_equals_one_that_was_never_interrupted(
    tmp_path: Path, resume_step: int
) -> None:
    whole, resumed = tmp_path / "whole", tmp_path / "resumed"
    log(whole, range(1, 13))
    log(resumed, range(1, 11))
    with (resumed / "metrics.jsonl").open("a") as file:
        file.write('{"step": 11, "lo')
    log(resumed, range(resume_step + 1, 13), resume_step=resume_step)
    assert (resumed / "metrics.jsonl").read_bytes() == (whole / "metrics.jsonl").read_bytes()
    for tag in events(whole).Tags()["scalars"]:
        assert points(resumed, tag) == points(whole, tag), tag
    assert {path.name for path in resumed.iterdir()} == {"metrics.jsonl", "tensorboard"}


def test_a_new_run_in_the_same_folder_shows_nothing_of_the_old(tmp_path: Path) -> None:
    log(tmp_path, range(1, 9))
    log(tmp_path, range(1, 4))
    assert [line["step"] for line in read_lines(tmp_path / "metrics.jsonl")] == [1, 2, 3]
    assert points(tmp_path, "loss/web") == [(1, 1.0), (2, 2.0), (3, 3.0)]


def test_resuming_without_a_file_starts_one(tmp_path: Path) -> None:
    log(tmp_path, range(5, 7), resume_step=4)
    assert read_lines(tmp_path / "metrics.jsonl")[0]["step"] == 5


def test_a_last_line_that_was_cut_off_is_left_out_and_another_broken_one_is_reported(
    tmp_path: Path,
) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": 2')
    assert read_lines(path) == [{"step": 1}]
    path.write_text('{"step": 1}\n\x00\x00\x00\n{"step": 3}\n')
    with pytest.raises(BadInput, match=r"metrics.jsonl:2 is .*must be a JSON object.*delete"):
        read_lines(path)
    path.write_text('{"loss": 1}\n{"step": 3}\n')
    with pytest.raises(BadInput, match=r"metrics.jsonl:1"):
        read_lines(path)


def test_the_page_draws_each_chart_from_exactly_its_own_tags(tmp_path: Path) -> None:
    log(tmp_path, range(1, 6))
    layout = layout_pb2.Layout()
    tensor = events(tmp_path).Tensors("custom_scalars__config__")[0].tensor_proto
    layout.ParseFromString(tensor.string_val[0])
    charts = {c.title: list(c.multiline.tag) for group in layout.category for c in group.chart}
    tags = events(tmp_path).Tags()["scalars"]
    drawn = {
        title: [tag for tag in tags for pattern in patterns if re.match(pattern, tag)]
        for title, patterns in charts.items()
    }
    assert drawn["training loss"] == ["loss/web", "loss/web.2"]
    assert drawn["held-out loss"] == ["held_out_loss/code"]
    assert drawn["forgetting"] == ["forgetting/code"]
    (band,) = [
        chart.margin.series[0]
        for group in layout.category
        for chart in group.chart
        if chart.title.startswith("forgetting of code")
    ]
    assert {band.value, band.lower} < set(tags)
    assert band.upper == "intervals/forgetting_high/code"
    assert drawn["share of the gradient"] == ["gradient_share/web"]
    assert drawn["time of a step by part"] == ["time/step_s"]
    assert {"share of rows", "share of tokens", "share of loss tokens"} < charts.keys()


def test_a_text_is_shown_next_to_the_charts(tmp_path: Path) -> None:
    run_log = RunLog(tmp_path, sources=["web"], held_out=[], resume_step=None)
    for step in (0, 4):
        run_log.show_text("behaviour/samples", f"| prompt | step {step} |", step)
    run_log.close()
    shown = events(tmp_path).Tensors("behaviour/samples/text_summary")
    texts = [event.tensor_proto.string_val[0].decode() for event in shown]
    assert texts == ["| prompt | step 0 |", "| prompt | step 4 |"]
    assert [event.step for event in shown] == [0, 4]


def test_recipe_and_hyperparameters_are_on_the_page_of_the_one_run(tmp_path: Path) -> None:
    log(tmp_path / "one-way", range(1, 3))
    runs = EventMultiplexer().AddRunsFromDirectory(str(tmp_path)).Reload()
    assert list(runs.Runs()) == ["one-way/tensorboard"]
    recipe = runs.Tensors("one-way/tensorboard", "recipe/text_summary")[0].tensor_proto
    assert recipe.string_val[0] == b"    seed: 1"
    content = runs.GetAccumulator("one-way/tensorboard").PluginTagToContent("hparams")
    start = plugin_data_pb2.HParamsPluginData.FromString(content["_hparams_/session_start_info"])
    given = start.session_start_info.hparams
    assert given["lr"].number_value == pytest.approx(1e-4)
    assert (given["objective"].string_value, given["two_way"].string_value) == (
        "per_source",
        "true",
    )
    assert len(list((tmp_path / "one-way" / "tensorboard").iterdir())) == 1
