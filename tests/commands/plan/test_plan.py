"""A plan says what the run then logs; its memory is checked against sums by hand and a real
process.
"""

import json
from dataclasses import replace

import numpy as np
import pytest
from support.commands import printed
from support.corpora import locate, write_source
from support.ranks import ROOT, environment, free_port, start_script
from support.templates import CHATML

from bigmix.commands.main import main
from bigmix.commands.plan.counts import row_counts
from bigmix.commands.plan.forecast import Machine, forecast
from bigmix.commands.plan.memory import Setting, memory_of
from bigmix.commands.plan.shape import Activations, Shape, shape_of
from bigmix.commands.plan.show import as_json
from bigmix.commands.plan.warnings import warnings_of
from bigmix.errors import BadInput
from bigmix.evaluation.behaviour.inputs import BehaviourInputs
from bigmix.evaluation.behaviour.prompts import read_prompts
from bigmix.recipe import load_recipe
from bigmix.recipe.sections import Behaviour, ModelSettings
from bigmix.train.inputs import open_inputs
from bigmix.types import IGNORE

RECIPE = """\
model: {config: {model_type: llama, vocab_size: 96, hidden_size: 32, intermediate_size: 64,
                 num_hidden_layers: 2,
                 num_attention_heads: 4, max_position_embeddings: 64}}
sequence_length: 64
rows_per_step: 4
sources:
  web: {path: web, role: replay, share: [[0, 0.5], [8, 0.1]]}
  chat: {path: chat, role: task, share: 0.75, loss_share: 0.5}
budget: {steps: 20}
train: {lr: 1e-2, micro_batch_rows: 2, log_every: 20}
checkpoint: {export: false}
deepspeed: ds_configs/cpu.json
output: run
"""
CPU = Machine(num_gpus=1, gpu="cpu", device_gib=8, mfu=0.4)
MIB = 1 << 20


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("plan")
    write_source(folder / "web", "text", shards=1)
    write_source(folder / "chat", "chat", seed=1, documents=30)
    write_source(folder / "long", "chat", seed=1, documents=30, lengths=(40, 80))
    write_source(folder / "half", "chat", seed=1, documents=30, lengths=(34, 48))
    (folder / "recipe.yaml").write_text(RECIPE)
    return folder


@pytest.fixture
def here(data, monkeypatch):
    monkeypatch.chdir(data)


def as_printed(folder, *words):
    return json.loads(printed(folder, "plan", "recipe.yaml", *words, "--gpu", "cpu", "--json"))


def planned(*overrides, machine=CPU):
    recipe = load_recipe("recipe.yaml", overrides)
    inputs = open_inputs(recipe, ranks=machine.num_gpus, verify=False)
    plan = forecast(recipe, inputs, inputs.plan, machine)
    return plan, warnings_of(recipe, plan, machine)


@pytest.mark.slow
@pytest.mark.parametrize("objective", ["per_source", "per_token"])
def test_a_plan_says_what_the_run_logs(data, objective):
    overrides = [f"objective={objective}", f"output={objective}"]
    words = ("recipe.yaml", *overrides)
    ran = start_script(ROOT / "launch/train.py", data, environment(0, 1, free_port()), *words)
    output, _ = ran.communicate()
    assert ran.returncode == 0, output
    logged = json.loads((data / objective / "metrics.jsonl").read_text().splitlines()[-1])
    plan = as_printed(data, *overrides)
    assert plan["exact"] and plan["steps"] == logged["step"] == 20
    for name, source in plan["sources"].items():
        for unit in ("rows", "tokens", "loss_tokens"):
            assert source[unit] == logged[f"total_{unit}/{name}"]
            assert source["share"][unit] == pytest.approx(logged[f"share_{unit}/{name}"])
        assert source["epochs"] == logged[f"epoch/{name}"]
        assert source["share"]["gradient"] == pytest.approx(logged[f"gradient_share/{name}"])


def test_rows_are_counted_without_being_read(here):
    inputs = open_inputs(load_recipe("recipe.yaml"), ranks=1, verify=False)
    for name, stream in inputs.plan.streams.items():
        count = 2 * stream.rows_per_epoch + 3
        counts = row_counts(inputs.plan, name, count)
        rows = [stream.read(locate(stream, index)) for index in range(count)]
        assert counts.tokens_R.tolist() == [row.num_tokens for row in rows]
        assert counts.loss_tokens_R.tolist() == [
            int((row.labels_T != IGNORE).sum()) for row in rows
        ]
        sum_sq_lengths = [
            int((np.diff(row.starts_P, append=row.num_tokens) ** 2).sum()) for row in rows
        ]
        assert counts.sum_sq_lengths_R.tolist() == sum_sq_lengths


def test_a_long_run_is_estimated_and_says_so(here, monkeypatch):
    exact, _ = planned("budget.steps=300")
    monkeypatch.setattr("bigmix.commands.plan.counts.EXACT_ROWS", 100)
    about, _ = planned("budget.steps=300")
    assert exact.counts.is_exact and not about.counts.is_exact
    for name, source in about.counts.sources.items():
        known = exact.counts.sources[name]
        assert (source.num_rows, source.epochs) == (known.num_rows, known.epochs)
        assert source.num_loss_tokens == pytest.approx(known.num_loss_tokens, rel=0.02)
        assert source.num_steps == pytest.approx(known.num_steps, rel=0.02)
        share = exact.counts.shares("gradient")[name]
        assert about.counts.shares("gradient")[name] == pytest.approx(share, abs=0.01)


def test_what_packing_leaves_out_is_counted(here):
    inputs = open_inputs(
        load_recipe("recipe.yaml", ["sources.chat.path=long"]), ranks=1, verify=False
    )
    lost, packed = (
        inputs.plan.streams["chat"].lost,
        inputs.plan.streams["chat"].rows_per_epoch,
    )
    assert lost.dropped > 0 and lost.truncated == 0 and packed > 0
    assert lost.num_tokens > 64 * lost.dropped


def test_documents_that_are_held_out_are_not_lost(here):
    plan, _ = planned()
    source = plan.counts.sources["chat"]
    assert replace(source, num_read=100, dropped={"held_out": 50}).dropped_fraction == 0
    half = replace(source, num_read=100, dropped={"held_out": 50, "bad_row": 10})
    assert half.dropped_fraction == pytest.approx(0.2)


def test_the_fill_ratio_is_the_part_of_the_capacity_that_is_trained(here):
    plan, warnings = planned("sources.chat.path=half")
    source = plan.counts.sources["chat"]
    assert source.capacity_tokens == source.num_rows * 64
    assert source.fill_ratio == source.num_tokens / source.capacity_tokens
    (warning,) = [text for text in warnings if "of its rows is padding" in text]
    assert f"a row holds {source.num_tokens / source.num_rows:,.0f} of 64 tokens" in warning


@pytest.mark.parametrize(
    ("overrides", "text"),
    [
        (
            ["sources.web.share=0.1", "budget.steps=40"],
            "web has 0.45 rows a step, so it is in only 45% of the steps",
        ),
        (["sources.web.share=0.1", "budget.steps=40"], "set rows_per_step=9 or more"),
        (["sources.chat.share=20"], "web has no row at all in this run"),
        (["budget.steps=900"], "chat is repeated"),
        (["sources.chat.path=half"], "of its rows is padding"),
        (["sources.chat.path=long"], "are dropped ("),
        (["objective=per_token", "sources.chat.loss_share=null"], "set objective=per_source"),
    ],
)
def test_a_recipe_that_needs_a_look_has_a_warning(here, overrides, text):
    _, warnings = planned(*overrides)
    assert any(text in warning for warning in warnings), warnings


def test_a_sound_recipe_has_no_warnings(here):
    assert planned("sources.web.share=0.25")[1] == []


def test_a_chat_model_without_chat_replay_has_a_warning(here, tmp_path):
    recipe = load_recipe("recipe.yaml", ["sources.web.share=0.25"])
    inputs = open_inputs(recipe, ranks=1, verify=False)
    plan = forecast(recipe, inputs, inputs.plan, CPU)
    (tmp_path / "chat_template.jinja").write_text("{{ messages }}")
    model = ModelSettings(path=str(tmp_path))
    with_path = recipe.model_copy(update={"model": model})
    (warning,) = warnings_of(with_path, plan, CPU)
    assert "is a chat model and no source of chats is replayed" in warning
    web = recipe.sources["web"].model_copy(update={"role": "task"})
    chat = recipe.sources["chat"].model_copy(update={"role": "replay"})
    changed = with_path.model_copy(update={"sources": {"web": web, "chat": chat}})
    assert warnings_of(changed, plan, CPU) == []


def test_too_little_memory_is_a_warning_with_remedies(here):
    small = Machine(num_gpus=1, gpu="H100", device_gib=0.01, mfu=0.4)
    _, warnings = planned("model.dtype=fp32", machine=small)
    assert "does not fit 0.01 GiB" in warnings[-1]
    for remedy in ("activation_checkpointing=true", "micro_batch_rows=1", "zero3_offload.json"):
        assert remedy in warnings[-1]


def test_all_faults_are_reported_at_once_and_nothing_is_planned(here, capsys):
    assert main(["plan", "recipe.yaml", "--gpus", "3", "sources.web.path=nowhere"]) == 2
    shown = capsys.readouterr()
    assert shown.out == "" and "rows_per_step is 4, must be a multiple" in shown.err
    assert "nowhere is not a prepared source" in shown.err
    assert main(["plan", "recipe.yaml", "--gpu", "K80"]) == 2
    assert "--gpu is K80, must be one of" in capsys.readouterr().err


def shape(**changes):
    sizes = {
        "matrices": (1000, 400, 1000),
        "vectors": (10, 11),
        "num_layers": 2,
        "hidden_size": 10,
        "vocab_size": 100,
        "is_tied": False,
        "cost": None,
        "activations": Activations(total=5000, outside=1000, layer=2000, entrance=80, widest=300),
    }
    return Shape(**sizes | changes)


def setting(zero, *, dtype="bf16", ranks=4, on_gpu=True, checkpointing=False, **keys):
    return Setting(
        keys={"zero_optimization": zero, **keys},
        num_ranks=ranks,
        dtype=dtype,
        on_gpu=on_gpu,
        num_tokens=20,
        device_bytes=0,
        loss_chunk_mib=None,
        activation_checkpointing=checkpointing,
    )


ZERO3 = {
    "stage": 3,
    "reduce_bucket_size": 500,
    "stage3_prefetch_bucket_size": 200,
    "stage3_param_persistence_threshold": 100,
}


def parts_of(a_shape, a_setting):
    return {p.name: (p.forward, p.backward, p.step) for p in memory_of(a_shape, a_setting).parts}


def test_memory_of_zero_3_by_hand():
    shard = 250 + 100 + 250 + 3 + 3
    parts = parts_of(shape(), setting(ZERO3, data_types={"grad_accum_dtype": "fp32"}))
    assert parts == {
        "weights": (2 * shard,) * 3,
        "master weights, fp32": (4 * shard,) * 3,
        "Adam moments, fp32": (8 * shard,) * 3,
        "gradients": (4 * shard,) * 3,
        "reduce bucket": (2 * 500,) * 3,
        # 21 weights are never sharded; the head or one of two layers, and 200 ahead
        "gathered weights": (2 * (21 + 1200), 2 * (21 + 200 + 200), 2 * 21),
        "activations": (5000, 5000, 0),
        # 4 V D, D for each of 20 tokens and of 16 in a chunk, and a chunk's logits in fp32
        "head and loss": (4000 + 2 * 36 * 10 + 4 * 1600, 0, 0),
        "gradients on their way": (0, 3 * 300 + 2 * 80 + 2 * 400, 0),
        "optimizer's step": (0, 0, 4 * 600),
    }


def test_an_average_of_the_weights_is_counted_on_the_device_and_in_checkpoints():
    shard = 250 + 100 + 250 + 3 + 3
    averaged = replace(setting(ZERO3), keeps_average=True, saves_in_background=True)
    parts = parts_of(shape(), averaged)
    assert parts["average of the weights, fp32"] == (4 * shard,) * 3
    assert parts["copy for checkpoints"] == (16 * shard,) * 3


def test_memory_that_other_settings_move():
    cpu = parts_of(shape(), setting(ZERO3, dtype="fp32", on_gpu=False))
    assert cpu["optimizer's step"] == (0, 0, (4 + 8) * 600)
    # A layer's gradients and two copies of the bucket, when what the layer kept is gone.
    assert cpu["gradients on their way"][1] == 4 * 200 + 2 * 500 * 4 - 2000
    bf16_sums = parts_of(shape(), setting(ZERO3))
    assert bf16_sums["gradients"][0] == 2 * 606 and bf16_sums["optimizer's step"][2] == 6 * 600
    few = parts_of(shape(), setting(ZERO3, checkpointing=True))
    assert few["activations"] == (1000 + 2 * 80, 1000 + 2 * 80 + 2000, 0)
    assert parts_of(shape(is_tied=True), setting(ZERO3))["head and loss"][1] == 4 * 1000
    alone = parts_of(shape(), setting(ZERO3, ranks=1))
    assert "gathered weights" not in alone
    two = parts_of(shape(), setting({"stage": 2, "reduce_bucket_size": 500, "overlap_comm": True}))
    assert two["weights"] == (2 * 2421,) * 3 and two["reduce bucket"][0] == 2 * 2 * 500


def test_a_frozen_reference_by_hand():
    other = shape(hidden_size=20, matrices=(2000, 400), vectors=(10,))
    parts = {p.name: p for p in memory_of(shape(), setting(ZERO3), other).parts}
    assert parts["reference weights"].backward == 2 * (500 + 100 + 3)
    # its gathered head, and its hidden states of 20 tokens; a chunk is 16 tokens of two logits each
    assert parts["reference at the loss"].forward == 2 * (100 * 20 + 20 * 20)
    assert parts["head and loss"].forward == 4000 + 2 * 36 * 10 + 2 * 4 * 1600
    stage_2 = {p.name: p for p in memory_of(shape(), setting({"stage": 2}), other).parts}
    assert stage_2["reference weights"].step == 2 * 2410
    assert stage_2["reference at the loss"].forward == 2 * 20 * 20


def test_offloading_moves_states_off_the_device():
    offload = {"offload_optimizer": {"device": "cpu"}, "offload_param": {"device": "cpu"}}
    memory = memory_of(shape(), setting(ZERO3 | offload))
    assert memory.total("step", "host") == (2 + 4 + 8 + 2 + 4) * 606
    assert memory.total("step") == 2 * 500 + 2 * 21
    nvme = memory_of(shape(), setting(ZERO3 | {"offload_optimizer": {"device": "nvme"}}))
    assert nvme.peak("nvme") == 12 * 606


def test_what_a_layer_keeps_by_hand():
    """A row of T = 16 positions, D = 32, F = 64, 4 heads and 2 for keys, in fp32; the letters are
    those of docs/plan.md.
    """
    import transformers

    config = transformers.LlamaConfig(
        vocab_size=96,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
    )
    kept = shape_of(
        config, dtype="fp32", attention="flash_attention_2", micro_batch_rows=1, row_tokens=16
    )
    narrow, wide, one = 16 * 32 * 4, 16 * 64 * 4, 16 * 4
    norms = 2 * (3 * narrow + one)  # input, normed, output; the inverse root of each token
    attention = (
        narrow + 2 * narrow // 2 + narrow + 4 * one
    )  # query, half as wide keys and values, output, log-sum-exp
    mlp = 4 * wide  # gate, its activation, up, their product
    assert kept.activations.layer == pytest.approx(norms + attention + mlp, rel=0.03)
    assert kept.activations.entrance == narrow and kept.activations.widest == wide
    masked = shape_of(config, dtype="fp32", attention="sdpa", micro_batch_rows=1, row_tokens=16)
    more = 2 * narrow // 2 + 16 * 16 * 4  # keys and values for all heads, and the mask
    assert masked.activations.layer - kept.activations.layer == more


def test_seventy_billion_weights_are_planned_on_a_laptop():
    import transformers

    config = transformers.LlamaConfig(
        vocab_size=128256,
        hidden_size=8192,
        intermediate_size=28672,
        num_hidden_layers=80,
        num_attention_heads=64,
        num_key_value_heads=8,
        max_position_embeddings=8192,
    )
    sizes = shape_of(config, dtype="bf16", attention="sdpa", micro_batch_rows=1, row_tokens=4096)
    assert sizes.num_parameters == 70_553_706_496 and sizes.num_layers == 80


def test_the_answers_of_the_behaviour_probe_are_counted(here, with_template):
    chat = with_template(CHATML)
    recipe = load_recipe("recipe.yaml", ["evaluate.every=8"])
    inputs = open_inputs(recipe, ranks=1, verify=False)
    prompts = read_prompts(None, ("en",))[:50]
    for when, num_evaluations in (("every", 4), ("ends", 2)):
        settings = Behaviour(when=when, max_new_tokens=10, batch_rows=4)
        asked = BehaviourInputs(settings=settings, prompts=prompts, tokenizer=chat.name)
        probed = replace(inputs, behaviour=asked)
        (cost, gpu) = (
            forecast(recipe, probed, inputs.plan, machine).behaviour
            for machine in (CPU, replace(CPU, gpu="H100"))
        )
        assert (cost.num_prompts, cost.num_evaluations) == (50, num_evaluations)
        assert cost.tokens_per_evaluation == 500 and cost.tokens == 500 * num_evaluations
        # 13 batches of 10 tokens, 2 layers of a millisecond each
        assert cost.seconds is None and gpu.seconds == pytest.approx(0.26 * num_evaluations)
    shown = as_json(replace(planned()[0], behaviour=gpu), CPU, [])["behaviour"]
    assert shown == {
        "prompts": 50,
        "evaluations": 2,
        "tokens_per_evaluation": 500,
        "tokens": 1000,
        "seconds": gpu.seconds,
    }
    assert as_json(planned()[0], CPU, [])["behaviour"] is None


def test_json_is_stable(here):
    plan, warnings = planned()
    keys = as_json(plan, CPU, warnings)
    assert list(keys) == [
        "version",
        "steps",
        "exact",
        "parameters",
        "flops",
        "seconds",
        "behaviour",
        "gpus",
        "sources",
        "memory",
        "disk",
        "warnings",
    ]
    assert keys["disk"]["checkpoint"] == 12 * plan.shape.num_parameters


def test_a_model_that_does_not_fit_the_data_is_refused(here):
    with pytest.raises(BadInput, match="the model has positions for 32"):
        planned("model.config.max_position_embeddings=32")


LARGE = """\
model: {config: {model_type: llama, vocab_size: 8192, hidden_size: 512, intermediate_size: 1536,
                 num_hidden_layers: 8,
                 num_attention_heads: 8, num_key_value_heads: 4, max_position_embeddings: 512}}
sequence_length: 256
rows_per_step: 4
sources: {web: {path: web, role: replay, share: 1}}
budget: {steps: 2}
train: {lr: 1e-3, micro_batch_rows: 2, log_every: 1}
checkpoint: {export: false}
deepspeed: ds_configs/cpu.json
output: run
"""
TINY = [
    f"model.config.{key}"
    for key in ("hidden_size=32", "intermediate_size=64", "num_hidden_layers=1")
]


def _peaks(folder, name, *overrides):
    """The peak MiB of the first of two ranks: as it logged them, and as the plan predicts them."""
    port, words = free_port(), ("recipe.yaml", f"output={name}", *overrides)
    ranks = [
        start_script(ROOT / "tests/support/frugal.py", folder, environment(rank, 2, port), *words)
        for rank in range(2)
    ]
    for rank in ranks:
        output, _ = rank.communicate()
        assert rank.returncode == 0, output
    last = json.loads((folder / name / "metrics.jsonl").read_text().splitlines()[-1])
    plan = as_printed(folder, *overrides, "--gpus", "2")
    return last["peak_gib"] * 1024, plan["memory"]["device"] / MIB


@pytest.mark.slow
def test_memory_is_within_five_per_cent_of_what_a_rank_takes(tmp_path):
    """A model of one layer is subtracted on both sides, and with it the interpreter and the
    libraries.
    """
    write_source(tmp_path / "web", "text", documents=400, lengths=(20, 250))
    (tmp_path / "recipe.yaml").write_text(LARGE)
    large, expected_large = _peaks(tmp_path, "large")
    tiny, expected_tiny = _peaks(tmp_path, "tiny", *TINY)
    assert large - tiny > 400
    assert expected_large - expected_tiny == pytest.approx(large - tiny, rel=0.05)
