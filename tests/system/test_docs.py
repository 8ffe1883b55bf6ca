"""What the documents say is what the code does."""

import json
import re
from pathlib import Path

import pytest
import torch

from bigmix import __version__
from bigmix.model.ds_config import BatchSize, complete, read_ds_config
from bigmix.recipe import Recipe, load_recipe
from bigmix.recipe.document import document

ROOT = Path(__file__).resolve().parents[2]


def test_the_recipe_reference_is_current():
    assert (ROOT / "docs/recipe.md").read_text() == document(), "run `make docs`"


def test_the_recipe_reference_has_every_table_of_settings():
    page, tables = document(), Recipe.model_json_schema()["$defs"].values()
    # A share that is written {temperature: 0.5} is explained where shares are.
    described = [t["description"] for t in tables if len(t["properties"]) > 1]
    assert len(described) > 10
    assert not [text for text in described if f"\n\n{text}\n\n| key |" not in page]


def test_every_recipe_in_the_readme_is_valid_and_short(tmp_path):
    blocks = re.findall(r"```yaml\n(.*?)```", (ROOT / "README.md").read_text(), re.S)
    assert blocks
    for block in blocks:
        path = tmp_path / "recipe.yaml"
        path.write_text(block)
        load_recipe(str(path))
        assert len(block.splitlines()) <= 15


def test_the_quick_starts_recipes_differ_in_their_sources_alone():
    folder = ROOT / "bigmix/commands/quickstart"
    one, two = (load_recipe(str(folder / f"{name}.yaml")) for name in ("one-way", "two-way"))
    assert one.train == two.train and one.budget == two.budget and one.seed == two.seed
    assert one.model == two.model and two.sources["code"].share == 0.2
    load_recipe(str(folder / "base.yaml"))


def test_every_deepspeed_file_takes_what_the_recipe_decides():
    files = sorted((ROOT / "ds_configs").glob("*.json"))
    assert {f.stem for f in files} >= {
        "zero1",
        "zero2",
        "zero3",
        "zero3_offload",
        "zero3_nvme",
        "zero3_hpz",
        "cpu",
    }
    for file in files:
        batch = BatchSize(micro_batch_rows=2, num_micro_batches=4, num_ranks=8)
        keys = complete(read_ds_config(f"ds_configs/{file.name}"), batch, "bf16", clip=1.0)
        assert keys["train_batch_size"] == 64 and keys["bf16"]["enabled"] is True
        json.dumps(keys)


def test_the_changelog_has_this_version():
    assert f"## {__version__}" in (ROOT / "CHANGELOG.md").read_text()


def test_the_index_lists_every_page():
    pages = {path.relative_to(ROOT / "docs").as_posix() for path in ROOT.glob("docs/**/*.md")}
    index = (ROOT / "docs/README.md").read_text()
    assert pages - {"README.md"} == {page for page in pages if f"- [{page}]({page}): " in index}


@pytest.mark.parametrize("page", ["CONTRIBUTING.md", "docs/README.md", "docs/api.md"])
def test_links_and_file_names_of_a_page_are_of_files_that_are_there(page):
    text = (ROOT / page).read_text()
    links = re.findall(r"\]\(([^)#:]+)\)", text)
    named = re.findall(r"`((?:bigmix|tests|launch|docs)/[\w/.]+)`", text)
    assert links
    for path in [*((ROOT / page).parent / link for link in links), *(ROOT / n for n in named)]:
        assert path.exists() or "NAME" in path.name, path


def test_the_loss_as_a_function_is_called_as_its_page_says():
    (code,) = re.findall(r"```python\n(.*?)```", (ROOT / "docs/loss.md").read_text(), re.S)
    labels = torch.tensor([3, -100, 5, 1])
    values = {
        "labels_T": labels,
        "groups_T": torch.tensor([0, 0, 1, 1]),
        "coefficients_G": torch.tensor([0.5, 0.5]),
        "hidden_TD": torch.randn(4, 8, requires_grad=True),
        "head_VD": torch.randn(11, 8, requires_grad=True),
    }
    exec(code, values)
    nll = torch.nn.functional.cross_entropy(
        values["hidden_TD"] @ values["head_VD"].T, labels, reduction="none"
    )
    assert torch.allclose(values["nll_G"], torch.stack([nll[0], nll[2] + nll[3]]))
    assert values["head_VD"].grad is not None
