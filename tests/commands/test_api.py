"""The Python API: light to import, and the same rows, runs and errors as the commands."""

import ast
import json
import os
import re
import signal
import subprocess
import sys
import threading
from itertools import pairwise

import numpy as np
import pytest
import torch
from support.corpora import write_source
from support.models import VOCABULARY
from support.ranks import ROOT, start_script
from support.runs import bare, end, lines, recipe_with_sources, start, weights
from transformers import AutoModelForCausalLM, LlamaConfig

import bigmix
from bigmix.cluster.signals import STOP_SIGNALS, stop_requests_here
from bigmix.data.records import RankRows
from bigmix.recipe import load
from bigmix.train.inputs import open_inputs

STEPS = ("budget.steps=6",)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return recipe_with_sources(tmp_path_factory.mktemp("api"))


@pytest.fixture
def recipe(data, monkeypatch):
    monkeypatch.chdir(data)
    return bigmix.load_recipe("recipe.yaml", STEPS)


def in_a_process(code, folder):
    """What a fresh interpreter prints."""
    environment = os.environ | {"PYTHONPATH": f"{ROOT}", "PYTHONDONTWRITEBYTECODE": ""}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=folder, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def test_nothing_heavy_is_imported_before_it_is_needed(data):
    printed = in_a_process(
        """\
import sys
def show():
    heavy = "torch", "transformers", "deepspeed", "matplotlib", "numpy", "pydantic", "datasets"
    print(*(name for name in heavy if name in sys.modules))
import bigmix
show()
recipe = bigmix.load_recipe("recipe.yaml")
bigmix.recipe_to_yaml(recipe)
assert not [name for name in sys.modules if name.startswith(("torch", "transformers", "deeps"))]
bigmix.plan(recipe)
with bigmix.batches(recipe) as batches:
    next(batches)
show()
""",
        data,
    )
    assert printed == ["", "numpy pydantic"]


def test_every_name_of_the_api_is_there():
    assert [name for name in bigmix.__all__ if not hasattr(bigmix, name)] == []
    assert set(bigmix.__all__) <= set(dir(bigmix))
    with pytest.raises(AttributeError, match="'bigmix' has no attribute 'lod_recipe'"):
        _ = bigmix.lod_recipe
    # Also once the package of the same name is imported.
    assert open_inputs.__module__ == "bigmix.train.inputs"


def test_type_checkers_and_users_are_given_the_same_names():
    tree = ast.parse((ROOT / "bigmix/__init__.py").read_text())
    for_checkers = next(node for node in tree.body if isinstance(node, ast.If))
    imports = [node for node in for_checkers.body if isinstance(node, ast.ImportFrom)]
    names = {alias.asname or alias.name for node in imports for alias in node.names}
    assert names | {"__version__"} == set(bigmix.__all__)
    for node in imports:
        for alias in node.names:
            found = getattr(bigmix, alias.asname or alias.name)
            assert found.__module__.startswith(node.module)


def test_the_page_lists_every_name():
    page = (ROOT / "docs/api.md").read_text()
    assert [
        name for name in bigmix.__all__ if f"`{name}" not in page and name != "__version__"
    ] == []


def test_a_recipe_is_loaded_from_a_path_and_shown_whole(recipe, data):
    assert bigmix.load_recipe(data / "recipe.yaml", STEPS) == recipe
    (data / "shown.yaml").write_text(bigmix.recipe_to_yaml(recipe))
    assert bigmix.load_recipe("shown.yaml") == recipe


def test_the_plan_counts_what_the_batches_hold(recipe):
    plan = bigmix.plan(recipe, num_ranks=2)
    assert plan.num_steps == 6 and plan.num_ranks == 2
    drawn = dict.fromkeys(recipe.sources, 0)
    for step in range(1, 7):
        shares, rows = plan.shares(step), plan.rows(step)
        assert sum(shares.values()) == pytest.approx(1) == sum(plan.loss_shares(step).values())
        assert rows == plan.rows(step, rank=0) + plan.rows(step, rank=1) and len(rows) == 8
        for name, count in plan.num_rows(step).items():
            assert count == sum(row.source == name for row in rows)
            drawn[name] += count
    epochs = plan.epochs()
    assert epochs == plan.epochs(6) and plan.epochs(1)["web"] < epochs["web"]
    per_epoch = {name: s.rows_per_epoch for name, s in plan.run_plan.streams.items()}
    assert epochs == {name: drawn[name] / per_epoch[name] for name in drawn}


def test_batches_are_the_rows_of_the_plan_one_after_another(recipe):
    """The slow obvious way: every row is read alone, as `bigmix preview` shows it."""
    plan = open_inputs(recipe, ranks=2, verify=False).plan
    for rank in range(2):
        rank_rows = RankRows(rank=rank, ranks=2, rows_per_step=8, micro_batch_rows=2)
        with bigmix.batches(recipe, rank=rank, num_ranks=2) as batches:
            assert batches.num_steps == 6 and tuple(batches.source_names) == ("web", "chat")
            found = list(batches)
        assert [batch.step for batch in found] == [k for k in range(1, 7) for _ in range(2)]
        assert [batch.is_last_of_step for batch in found] == [False, True] * 6
        for step in range(1, 7):
            parts = [batch for batch in found if batch.step == step]
            streams = plan.streams_at(step)
            ids = plan.row_ids_of_rank(rank_rows, step).ids()
            rows = [streams[row_id.source].read(row_id) for row_id in ids]
            for field, expected in {
                "input_ids": "ids_T",
                "targets": "labels_T",
                "position_ids": "positions_T",
            }.items():
                values = np.concatenate([getattr(batch, field) for batch in parts])
                assert values.dtype == np.int64
                assert (values == np.stack([getattr(row, expected) for row in rows])).all(), field
            sources = np.concatenate([batch.source_ids for batch in parts])
            assert [("web", "chat")[source] for source in sources] == [i.source for i in ids]
            loss_tokens = {
                name: sum(
                    int((row.labels_T != -100).sum()) for row in rows if row.id.source == name
                )
                for name in ("web", "chat")
            }
            assert parts[0].num_loss_tokens == loss_tokens


def test_labels_are_the_targets_one_position_later(recipe):
    with bigmix.batches(recipe) as batches:
        for batch in batches:
            assert (batch.labels[:, 1:] == batch.targets[:, :-1]).all()
            assert (batch.labels[:, 0] == -100).all() and (batch.targets[:, -1] == -100).all()
            in_loss = batch.labels != -100
            assert (batch.labels[in_loss] == batch.input_ids[in_loss]).all()
            # A document's first token follows nothing that it could be predicted from.
            assert not in_loss[batch.position_ids == 0].any()


@pytest.mark.parametrize("first_step", [1, 2, 6, 7])
def test_batches_from_a_step_on_are_the_rest_of_all(recipe, first_step):
    everything = list(bigmix.batches(recipe))
    rest = list(bigmix.batches(recipe, first_step=first_step))
    kept = [batch for batch in everything if batch.step >= first_step]
    assert len(rest) == len(kept)
    for one, other in zip(rest, kept, strict=True):
        assert one.step == other.step and (one.input_ids == other.input_ids).all()


def test_reading_ends_with_the_block_and_with_the_last_batch(recipe):
    def readers():
        return [t for t in threading.enumerate() if t.name.startswith("loader")]

    with bigmix.batches(recipe) as batches:
        next(batches)
        assert readers()
    assert not readers()
    assert list(batches) == []
    list(bigmix.batches(recipe))
    assert not readers()


def test_a_shard_that_cannot_be_read_ends_the_batches(tmp_path, monkeypatch):
    monkeypatch.chdir(recipe_with_sources(tmp_path))
    recipe = bigmix.load_recipe("recipe.yaml", STEPS)
    batches = bigmix.batches(recipe)
    for shard in tmp_path.glob("chat/*.tar"):
        shard.write_bytes(b"\0" * shard.stat().st_size)
    with batches, pytest.raises(bigmix.BigmixError, match=r"shard .*tar of chat cannot be used"):
        list(batches)


def test_models_of_transformers_see_each_document_alone(recipe):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
    )
    model = AutoModelForCausalLM.from_config(config).eval()
    with bigmix.batches(recipe) as batches:
        batch = next(batches)
    with torch.no_grad():
        packed = model(**batch.tensors(), use_cache=False)
        losses = []
        for ids, labels, positions in zip(
            *(batch.tensors()[n] for n in ("input_ids", "labels", "position_ids")), strict=True
        ):
            starts = [*(positions == 0).nonzero().flatten().tolist(), len(ids)]
            for begin, stop in pairwise(starts):
                logits = model(input_ids=ids[None, begin:stop], use_cache=False).logits[0]
                losses.append(
                    torch.nn.functional.cross_entropy(
                        logits[:-1], labels[begin + 1 : stop], reduction="sum"
                    )
                )
    num_tokens = int((batch.labels != -100).sum())
    assert float(packed.loss) == pytest.approx(float(sum(losses)) / num_tokens, rel=1e-5)


def test_what_cannot_be_is_refused_with_what_is_allowed(recipe, data, monkeypatch):
    plan = bigmix.plan(recipe)
    swept = load("recipe.yaml", ["sweep.train.lr=[1e-3,1e-2]"]).recipe
    for call, message in {
        lambda: plan.shares(0): "step is 0, must be from 1 to 6",
        lambda: plan.rows(7): "step is 7, must be from 1 to 6",
        lambda: plan.rows(1, rank=1): "rank is 1, must be from 0 to 0",
        lambda: bigmix.plan(recipe, num_ranks=0): "num_ranks is 0, must be 1 or more",
        lambda: bigmix.plan(recipe, num_ranks=3): "rows_per_step is 8, must be a multiple of",
        lambda: bigmix.batches(recipe, rank=2, num_ranks=2): "rank is 2, must be from 0 to 1",
        lambda: bigmix.batches(recipe, first_step=8): "first_step is 8, must be from 1 to 7",
        lambda: bigmix.run_training(swept): "the recipe is a sweep",
        lambda: bigmix.run_training(
            recipe, num_restarts=-1
        ): "num_restarts is -1, must be 0 or more",
        lambda: bigmix.compare([data / "web"], data / "report"): "web",
    }.items():
        with pytest.raises(bigmix.BadInput, match=re.escape(message)):
            call()
    monkeypatch.setenv("WORLD_SIZE", "4")
    with pytest.raises(bigmix.BadInput, match="a launcher has started this process as one of 4"):
        bigmix.run_training(recipe)


def test_signals_request_a_stop_and_their_handlers_are_put_back():
    before = {number: signal.getsignal(number) for number in STOP_SIGNALS}
    for number in STOP_SIGNALS:
        with stop_requests_here() as stop_signal:
            assert not stop_signal.is_set()
            signal.raise_signal(number)
            assert stop_signal.is_set() and stop_signal.reason == signal.Signals(number).name
            with pytest.raises(KeyboardInterrupt):
                signal.raise_signal(number)
        assert {number: signal.getsignal(number) for number in STOP_SIGNALS} == before


def test_in_another_thread_signals_are_left_alone():
    before = {number: signal.getsignal(number) for number in STOP_SIGNALS}
    found = []

    def work():
        with stop_requests_here() as stop_signal:
            found.append({number: signal.getsignal(number) for number in STOP_SIGNALS})
            found.append(stop_signal.is_set())

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert found == [before, False]


def test_no_process_group_may_be_there_before(recipe, tmp_path):
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1
    )
    try:
        with pytest.raises(bigmix.BadInput, match=r"in a process group of torch\.distributed"):
            bigmix.run_training(recipe)
    finally:
        torch.distributed.destroy_process_group()
    assert "RANK" not in os.environ


def run_script(folder, code):
    """What a script prints that ends well, in a process that has the libraries already."""
    (folder / "script.py").write_text(code)
    environment = bare(os.environ | {"PYTHONPATH": str(ROOT)})
    script = start_script(folder / "script.py", folder, environment)
    codes, output = end([script])
    assert codes == [0], output
    return output


@pytest.mark.slow
def test_the_examples_of_the_page_run(tmp_path):
    page = (ROOT / "docs/api.md").read_text()
    write_source(tmp_path / "web", "text")
    write_source(tmp_path / "chat", "chat", seed=1)
    write_source(tmp_path / "held", "chat", seed=1, shards=1)
    (written,) = re.findall(r"```yaml\n(.*?)```", page, re.S)
    (tmp_path / "recipe.yaml").write_text(written)
    examples = re.findall(r"```python\n(.*?)```", page, re.S)
    assert len(examples) == 7
    checks = """
assert len(faults) == 2 and faults[0].startswith("override train.lr=fast: "), faults
assert plan.num_steps == trained_steps == 4 and first_row.source in recipe.sources
assert model.lm_head.weight.grad.abs().sum() > 0
assert (folder / "export/model.safetensors").is_file()
assert summary["runs"]["run"]["steps"] == 4, summary
import json, pathlib
assert json.loads(pathlib.Path("report/summary.json").read_text()) == summary
"""
    output = run_script(tmp_path, "\n".join([*examples, checks]))
    assert "step 4/4 100%" in output and "run/metrics.jsonl run/export" in output


@pytest.mark.slow
def test_a_run_in_this_process_is_stopped_resumed_and_equal_to_a_command(data):
    """The first call is interrupted, the second ends the run; the process is as before each."""
    output = run_script(
        data,
        """\
import logging, os, signal, threading, time
from pathlib import Path
import torch
import bigmix

def process():
    handlers = [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)]
    launcher = [os.environ.get(name) for name in ("RANK", "WORLD_SIZE", "MASTER_PORT")]
    root = logging.getLogger()
    return handlers, launcher, root.handlers[:], root.level, torch.distributed.is_initialized()

def interrupt():
    while not Path("here/checkpoints/latest").exists():
        time.sleep(0.01)
    os.kill(os.getpid(), signal.SIGINT)

logging.getLogger().addHandler(logging.StreamHandler())
before = process()
recipe = bigmix.load_recipe("recipe.yaml", ["output=here", "budget.steps=16"])
threading.Thread(target=interrupt, daemon=True).start()
try:
    bigmix.run_training(recipe)
except bigmix.Interrupted as error:
    print(error)
else:
    raise SystemExit("the run was not interrupted")
assert process() == before
assert bigmix.run_training(recipe) == Path("here")
assert process() == before
""",
    )
    assert re.search(r"stopped on request after step \d+ of 16; the same command goes on", output)
    codes, by_command = end(start(data, 1, "output=command", "budget.steps=16"))
    assert codes == [0], by_command
    assert weights(data / "here") == weights(data / "command")
    assert lines(data / "here") == lines(data / "command")


@pytest.mark.slow
def test_several_ranks_are_processes_of_their_own(data):
    output = run_script(
        data,
        """\
import signal
import bigmix

handler = signal.getsignal(signal.SIGINT)
recipe = bigmix.load_recipe("recipe.yaml", ["output=two", "budget.steps=2"])
print(bigmix.run_training(recipe, num_ranks=2))
assert signal.getsignal(signal.SIGINT) is handler
# A fault that only the ranks find: the model knows fewer tokens than the sources have.
recipe = bigmix.load_recipe("recipe.yaml", ["output=small", "model.config.vocab_size=50"])
try:
    bigmix.run_training(recipe, num_ranks=2)
except bigmix.BadInput as error:
    print(error)
""",
    )
    assert (data / "two/export/model.safetensors").is_file()
    assert json.loads((data / "two/metrics.jsonl").read_text().splitlines()[1])["step"] == 1
    assert "step 2/2 100%" in output and "error: " in output
    assert "the 2 ranks refused the recipe; the ranks' messages are on stderr" in output
