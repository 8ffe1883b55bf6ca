"""Documents stay apart and the loss is the model's own in every family of models; a model in which
they are not is refused.
"""

import json
from contextlib import contextmanager
from dataclasses import replace

import numpy as np
import pytest
import torch
from support.models import FAMILIES, VOCABULARY
from support.ranks import run_on_ranks

from bigmix.errors import BadInput
from bigmix.loss.requests import LossBackendOptions
from bigmix.loss.terms import GroupSums, LogitRule, LossTerms, LossTokens
from bigmix.loss.torch_kernel import torch_backend
from bigmix.model.causal_lm import (
    MixedLM,
    ModelTensors,
    build,
    choose_attention,
    choose_dtype,
    max_positions,
    read_config,
)
from bigmix.model.checks import check_packing_isolation
from bigmix.model.engine import sharded_construction
from bigmix.model.flops import cost_of

CPU = torch.device("cpu")


def make(family, attention="eager", dtype="fp32", **changes):
    model = build(
        read_config(None, FAMILIES[family] | changes),
        None,
        dtype=dtype,
        attention=attention,
        activation_checkpointing=False,
        terms=LossTerms(),
        options=LossBackendOptions(backend=torch_backend, chunk_bytes=1 << 16),
        seed=0,
        construction=sharded_construction({}),
    )
    return model.eval()


class Plain:
    """What `check_packing_isolation` asks of an engine, with no engine behind it."""

    def __init__(self, model):
        self.module, self.forward, self.device = model, model, CPU

    @contextmanager
    def evaluating(self):
        with torch.no_grad():
            yield


def packed(lengths, seed=0):
    draw = np.random.default_rng(seed)
    ids = [torch.from_numpy(draw.integers(3, VOCABULARY, n)) for n in lengths]
    positions = [torch.arange(n) for n in lengths]
    return ids, torch.cat(ids)[None], torch.cat(positions)[None]


@pytest.mark.parametrize(
    ("family", "attention"),
    [("llama", "eager"), ("llama", "sdpa"), ("qwen", "sdpa"), ("gpt2", "sdpa"), ("gemma", "eager")],
)
def test_a_documents_logits_do_not_change_with_its_neighbours(family, attention):
    model = make(family, attention)
    documents, ids_BT, positions_BT = packed([7, 1, 30, 19, 2])
    with torch.no_grad():
        together = model.lm.get_output_embeddings()(model.hidden(ids_BT, positions_BT))[0]
    at = 0
    for ids in documents:
        with torch.no_grad():
            alone = model.lm.get_output_embeddings()(
                model.hidden(ids[None], torch.arange(len(ids))[None])
            )[0]
        assert torch.allclose(together[at : at + len(ids)], alone, atol=2e-6)
        at += len(ids)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_loss_is_that_of_the_models_own_logits(family):
    model = make(family)
    ids = torch.from_numpy(np.random.default_rng(1).integers(3, VOCABULARY, 50))
    logits = model.lm(input_ids=ids[None]).logits[0, :-1]
    expected = torch.nn.functional.cross_entropy(logits, ids[1:], reduction="sum")
    tokens = LossTokens(
        positions_N=torch.arange(49),
        labels_N=ids[1:],
        groups_N=torch.zeros(49, dtype=torch.long),
        coefficients_N=torch.ones(49),
        num_groups=1,
    )
    objective, sums = model(
        ModelTensors(
            ids_BT=ids[None],
            positions_BT=torch.arange(50)[None],
            tokens=tokens,
        )
    )
    assert torch.allclose(objective, expected, rtol=1e-5)
    assert torch.allclose(GroupSums.of(sums).nll_G[0], expected, rtol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_sound_models_pass(family, dtype):
    check_packing_isolation(Plain(make(family, dtype=dtype)), VOCABULARY)


def test_a_model_that_looks_across_documents_is_refused():
    class Leaking(MixedLM):
        def hidden(self, ids_BT, positions_BT):
            return self.lm.base_model(
                input_ids=ids_BT, attention_mask=torch.ones_like(ids_BT)
            ).last_hidden_state

    model = make("llama", "sdpa")
    model.__class__ = Leaking
    with pytest.raises(BadInput, match="looks across documents in a packed row"):
        check_packing_isolation(Plain(model), VOCABULARY)


def test_logits_that_are_made_in_an_unknown_way_are_refused():
    model = make("gemma", initializer_range=1.0)
    head = model.lm.get_output_embeddings()
    head.settings = replace(head.settings, rule=LogitRule())
    with pytest.raises(BadInput, match="by its own logits"):
        check_packing_isolation(Plain(model), VOCABULARY)


def test_choices_are_explained():
    gemma, llama = (read_config(None, FAMILIES[name]) for name in ("gemma", "llama"))
    assert choose_attention("auto", gemma, CPU, "fp32").value == "eager"
    assert choose_attention("auto", llama, CPU, "fp32").value == "sdpa"
    assert choose_attention("eager", llama, CPU, "fp32").reason == "as the recipe says"
    assert choose_dtype("auto", CPU).value == "fp32"
    assert max_positions(read_config(None, FAMILIES["gpt2"])) == 128


def test_a_configuration_that_is_none_is_refused(tmp_path):
    with pytest.raises(BadInput, match=r"model\.path .* gives no model configuration"):
        read_config(str(tmp_path), None)
    with pytest.raises(BadInput, match=r"reference\.model .* gives no model configuration"):
        read_config(str(tmp_path), None, key="reference.model")
    with pytest.raises(BadInput, match=r"model\.config gives no model configuration"):
        read_config(None, {"model_type": "no-such"})


@pytest.mark.parametrize("family", ["llama", "qwen"])
def test_flops_equal_those_that_torch_counts(family):
    from torch.utils.flop_counter import FlopCounterMode

    model, length = make(family, "eager"), 40
    with FlopCounterMode(display=False) as counter:
        model.lm(input_ids=torch.zeros(1, length, dtype=torch.long)).logits.sum().backward()
    cost = cost_of(model.lm)
    # torch counts both triangles of the attention matrix, and no gradient towards the embeddings'
    # input.
    full = cost.of_step(length, length, 2 * length**2)
    assert counter.get_total_flops() == pytest.approx(full, rel=0.02)


def test_a_model_from_scratch_is_built_in_shards_and_is_the_same_on_any_ranks(tmp_path):
    (alone,), pair = (run_on_ranks("sharded_build", ranks, tmp_path) for ranks in (1, 2))
    for family in FAMILIES:
        plain = dict(make(family).named_parameters())
        for name, weight in alone[family]["weights"].items():
            assert [other[family]["weights"][name] for other in pair] == [weight, weight]
            expected = float(plain[name].detach().std())
            assert weight["std"] == pytest.approx(expected, rel=0.25, abs=1e-6), name
        assert max(other[family]["largest_part"] for other in pair) <= 0.52


@pytest.mark.parametrize(
    ("ranks", "stage", "dtype", "families"),
    [
        (2, 3, "fp32", ["llama"]),
        pytest.param(2, 3, "fp32", list(FAMILIES), marks=pytest.mark.slow),
        pytest.param(2, 3, "bf16", list(FAMILIES), marks=pytest.mark.slow),
        pytest.param(1, 1, "bf16", ["llama", "qwen"], marks=pytest.mark.slow),
    ],
)
def test_an_export_gives_the_logits_of_the_engine(ranks, stage, dtype, families, tmp_path):
    file = tmp_path / "ds.json"
    keys = {"overlap_comm": False, "stage3_param_persistence_threshold": 100}
    file.write_text(
        json.dumps(
            {
                "zero_force_ds_cpu_optimizer": False,
                "zero_optimization": {"stage": stage, **(keys if stage == 3 else {})},
            }
        )
    )
    arguments = {
        "folder": str(tmp_path),
        "families": families,
        "file": str(file),
        "dtype": dtype,
        "shard_bytes": 20_000,
    }
    torch_name = {"fp32": "torch.float32", "bf16": "torch.bfloat16"}[dtype]
    for found in run_on_ranks("export_differences", ranks, tmp_path, arguments):
        assert set(found) == set(families)
        for difference, written, files in found.values():
            assert difference == 0 and written == torch_name
            assert {"README.md", "config.json", "model.safetensors.index.json"} <= set(files)
            assert not any(name.startswith(("part", "model.safetensors.s")) for name in files)
            assert sum(name.startswith("model-0000") for name in files) > 1
