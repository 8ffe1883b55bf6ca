"""What a comparison says of behaviour that was not measured, or not in the same way."""

import json
from pathlib import Path

import pytest
import yaml
from support.behaviour_runs import Answers, add_behaviour
from support.run_folders import Numbers, Recipe, write_run

from bigmix.commands.compare.judge import judge
from bigmix.commands.compare.read import read_runs

NOT_MEASURED = "Behaviour was not measured: whether the model still answers as the base did"
LOST, KEPT = Answers(forgetting=2.31, kept=0.0), Answers(forgetting=0.02, kept=1.0)


def run(folder: Path, answers: Answers | None, share: float) -> Path:
    numbers = Numbers(forgetting=0.3 - share)
    written = write_run(folder, Recipe(share=share), numbers, samples=False)
    return written if answers is None else add_behaviour(written, answers)


@pytest.mark.parametrize(
    ("behaviour", "base", "is_said"),
    [
        (None, "Qwen/Qwen2.5-0.5B-Instruct", True),  # the log of an earlier version
        ({"when": "off"}, "Qwen/Qwen2.5-0.5B-Instruct", True),
        ({"when": "auto"}, "Qwen/Qwen2.5-0.5B", False),  # the run found that it is no chat model
        (None, None, False),  # from scratch
        (None, "no-template", False),
        (None, "template", True),
    ],
)
def test_a_report_says_that_behaviour_was_not_measured(
    tmp_path: Path, behaviour: dict | None, base: str | None, is_said: bool
) -> None:
    models = tmp_path / "models"
    for name in ("no-template", "template"):
        (models / name).mkdir(parents=True)
        text = json.dumps({"chat_template" if name == "template" else "model_max_length": 8})
        (models / name / "tokenizer_config.json").write_text(text)
    local = str(models / base) if base in ("no-template", "template") else base
    for name, share in (("one-way", 0.0), ("two-way", 0.25)):
        folder = run(tmp_path / f"runs/{name}", None, share)
        recipe = yaml.safe_load((folder / "recipe.yaml").read_text())
        recipe["model"] = {"path": local}
        if behaviour is not None:
            recipe["behaviour"] = behaviour
        (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    detail = judge(read_runs([tmp_path / "runs"])).detail
    assert detail.startswith(NOT_MEASURED) == is_said


def test_a_run_whose_behaviour_was_not_measured_is_named(tmp_path: Path) -> None:
    run(tmp_path / "one-way", LOST, 0.0)
    run(tmp_path / "two-way", None, 0.25)
    comparison = judge(read_runs([tmp_path]))
    assert any("behaviour of two-way was not measured" in text for text in comparison.warnings)
    assert "behaviour" not in comparison.headline


def test_another_set_of_prompts_is_not_comparable(tmp_path: Path) -> None:
    run(tmp_path / "one-way", LOST, 0.0)
    two = run(tmp_path / "two-way", KEPT, 0.25)
    path = two / "metrics.jsonl"
    path.write_text(path.read_text().replace('"behaviour_prompts": 60', '"behaviour_prompts": 8'))
    (warning,) = judge(read_runs([tmp_path])).warnings
    assert "8 prompts, 40 with constraints, not 60 prompts, 40 with constraints" in warning
