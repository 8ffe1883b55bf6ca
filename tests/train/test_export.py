"""What a model card says of behaviour."""

from pathlib import Path

import pytest
from support.behaviour_runs import Answers, measures, prompts_of
from support.recipes import GOOD

from bigmix.recipe import Recipe, load_recipe
from bigmix.train.export import behaviour_section


def recipe(folder: Path, *overrides: str) -> Recipe:
    (folder / "recipe.yaml").write_text(GOOD)
    return load_recipe(str(folder / "recipe.yaml"), overrides)


def lines(kept: float) -> list[dict]:
    """The evaluations of a run that keeps a part of the base's answers."""
    found = []
    for step, part in ((0, 0.0), (20, 0.5), (40, 1.0)):
        answers = Answers(forgetting=2.0 * (1 - kept), kept=kept)
        found.append(
            {"step": step, "eval": True}
            | measures(answers, part, prompts_of(kept if step else 1.0))
        )
    return found


def test_a_card_has_the_base_and_the_model_side_by_side(tmp_path: Path) -> None:
    section = behaviour_section(recipe(tmp_path), lines(0.0))
    assert section.startswith(
        "## Behaviour\n\nAnswers to 60 general prompts, 40 of them with constraints, after step 40,"
    )
    rows = {line.split(" | ")[0].strip("| "): line for line in section.splitlines()}
    name = "prompts with constraints whose answer follows them"
    assert rows[name] == f"| {name} | 87.5% (77.5% to 97.5%) | 0.0% (-10.0% to 10.0%) |"
    assert (
        rows["forgetting, nats/token"]
        == "| forgetting, nats/token | – | 2.0000 (1.9500 to 2.0500) |"
    )
    assert rows["answers that end by themselves"].endswith("| 100.0% | 100.0% |")


def test_a_card_says_that_behaviour_was_lost_only_where_it_is_certain(tmp_path: Path) -> None:
    lost = behaviour_section(recipe(tmp_path), lines(0.0))
    assert "Behaviour of the base was lost (prompts with constraints whose answer follows" in lost
    assert "follows them: 0.0%, of the base 87.5%" in lost
    kept = behaviour_section(recipe(tmp_path), lines(0.95))
    assert "was lost (" not in kept
    assert "which does not prove that nothing was lost" in kept


@pytest.mark.parametrize(
    ("overrides", "section"),
    [
        (["behaviour=off"], "## Behaviour\n\nIt was not measured.\n"),
        ([], ""),  # the run has found that the base is no chat model
    ],
)
def test_a_card_without_a_probe(tmp_path: Path, overrides: list[str], section: str) -> None:
    evaluations = [{"step": 0, "eval": True, "held_out_loss/web": 1.0}]
    assert behaviour_section(recipe(tmp_path, *overrides), evaluations) == section
