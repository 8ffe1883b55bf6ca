"""Whether behaviour is measured is known from a tokenizer's files, before anything is imported."""

import json
import os
import subprocess
import sys

import pytest
from support.ranks import ROOT
from support.templates import CHATML

from bigmix.errors import BadInput
from bigmix.evaluation.behaviour.inputs import has_chat_template, open_behaviour
from bigmix.recipe.sections import Behaviour


def tokenizer(folder, template=None, **config):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    if template is not None:
        (folder / "chat_template.jinja").write_text(template)
    return str(folder)


@pytest.mark.parametrize(
    ("template", "config", "has_one"),
    [
        (None, {}, False),
        (CHATML, {}, True),
        ("", {}, False),
        (None, {"chat_template": CHATML}, True),
        (None, {"chat_template": None}, False),
        (None, {"chat_template": [{"name": "default", "template": CHATML}]}, True),
        (None, {"chat_template": [{"name": "rag", "template": CHATML}]}, False),
    ],
)
def test_a_chat_model_is_known_by_the_files_of_its_tokenizer(tmp_path, template, config, has_one):
    path = tokenizer(tmp_path / "model", template, **config)
    assert has_chat_template(path) == has_one
    found = open_behaviour(Behaviour(), path)
    assert (found is not None) == has_one
    assert open_behaviour(Behaviour(when="off"), path) is None


def test_a_tokenizer_that_cannot_be_read_has_none(tmp_path):
    (tmp_path / "tokenizer_config.json").write_text("{")
    (tmp_path / "vocabulary.model").write_bytes(b"\x00")
    for path in (tmp_path, tmp_path / "vocabulary.model", "no/such/model"):
        assert not has_chat_template(str(path))


def test_a_model_of_the_hub_is_known_by_the_same_files(tmp_path):
    """Of which some are in the cache; the hub cannot be reached."""
    for name, template in (("chat", CHATML), ("plain", None)):
        folder = tmp_path / f"hub/models--org--{name}"
        tokenizer(folder / "snapshots/1", template)
        (folder / "refs").mkdir()
        (folder / "refs/main").write_text("1")
    program = (
        "from bigmix.evaluation.behaviour.inputs import has_chat_template as has;"
        " print([has(f'org/{name}') for name in ('chat', 'plain', 'none')])"
    )
    done = subprocess.run(
        [sys.executable, "-c", program],
        cwd=ROOT,
        env=os.environ | {"HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "1"},
        check=True,
        capture_output=True,
        text=True,
    )
    assert done.stdout.split("\n")[0] == "[True, False, False]"


def test_a_probe_that_is_asked_for_needs_a_template(tmp_path):
    path = tokenizer(tmp_path / "plain")
    for when in ("every", "ends"):
        with pytest.raises(BadInput, match=f"behaviour.when is {when}, and no chat template is in"):
            open_behaviour(Behaviour(when=when), path)
    assert open_behaviour(Behaviour(when="auto"), None) is None


def test_the_settings_choose_the_prompts(tmp_path):
    path = tokenizer(tmp_path / "chat", CHATML)
    every = open_behaviour(Behaviour(), path).prompts
    assert len(every) > 200 and {prompt.language for prompt in every} == {"en", "zh"}
    few = open_behaviour(Behaviour(languages=["zh"], num_prompts=20), path).prompts
    assert len(few) == 20 and {prompt.language for prompt in few} == {"zh"}
    own = tmp_path / "own.jsonl"
    own.write_text('{"messages": [{"role": "user", "content": "Is it?"}]}\n{"messages": 7}\n')
    with pytest.raises(BadInput, match="own.jsonl, line 2"):
        open_behaviour(Behaviour(prompts=str(own)), path)


def test_it_imports_neither_torch_nor_transformers():
    program = (
        "import sys; import bigmix.evaluation.behaviour.inputs;"
        " assert not {'torch', 'transformers', 'tokenizers'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", program], cwd=ROOT, check=True)
