"""Packing changes nothing: loss and gradient of packed rows are those of each document alone, on
every backend.

Rows come the way a run's rows come: prepared source, stream, plan, step batch, tensors, the model's
forward. Next to it the slow obvious way: each document, or part of one, alone through the
model's own logits, with no positions, no packing and none of our loss; what is in its loss is known
from how the corpus is made.
"""

from dataclasses import replace
from functools import lru_cache

import numpy as np
import pytest
import torch
from support.corpora import endless_plan, one_stage, open_stream, write_source
from support.models import FAMILIES
from transformers import modeling_flash_attention_utils
from transformers.integrations import flash_attention
from transformers.utils import is_flash_attn_2_available

from bigmix.data.batch import assemble
from bigmix.data.loader import step_batch
from bigmix.data.mixture import Mixture
from bigmix.data.packing import PADDING, PackingOptions
from bigmix.data.records import RankRows
from bigmix.loss.requests import LossBackendOptions
from bigmix.loss.terms import GroupSums, LossTerms
from bigmix.loss.torch_kernel import torch_backend
from bigmix.model.causal_lm import build, read_config
from bigmix.model.inputs import to_device

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
STEPS, SEED = 3, 0
EXACT = 1e-5  # relative, in fp32
BF16 = 3e-2  # 8 bits of a number are 2 ** -8 = 0.4 % each time it is rounded
# Not a multiple of what rows are padded to: each row has padding, and full rows of text a document
# that is cut.
PACKINGS = {
    "text": PackingOptions(row_tokens=50, pad_to_multiple=16),
    "whole": PackingOptions(row_tokens=50, pad_to_multiple=16, whole_below=30),
    "chat": PackingOptions(row_tokens=50, pad_to_multiple=16),
    "cut": PackingOptions(row_tokens=50, pad_to_multiple=16, long_documents="truncate"),
}
# Families that have flex attention, with heads as wide as its kernel asks for.
WIDE = {"llama": {"hidden_size": 64}, "qwen": {"hidden_size": 64}, "gemma": {"head_dim": 16}}
COEFFICIENTS = {"text": 0.3, "whole": 1.1, "chat": 0.7, "cut": 0.2}


@pytest.fixture(scope="module")
def plan(tmp_path_factory):
    folder = tmp_path_factory.mktemp("isolation")
    for seed, name in enumerate(PACKINGS):
        kind = "text" if name in ("text", "whole") else "chat"
        lengths = (30, 70) if name == "cut" else (1, 45)
        write_source(folder / name, kind, seed=seed, documents=30, lengths=lengths)
    streams = {n: open_stream(n, str(folder / n), packing) for n, packing in PACKINGS.items()}
    mixture = Mixture(dict.fromkeys(PACKINGS, 0.25), rows_per_step=8)
    return endless_plan(mixture, one_stage(streams), SEED)


@pytest.fixture(scope="module")
def alone(plan):
    """What each family's documents give alone, made once: by eager attention, which has nothing to
    hide.
    """
    return lru_cache(
        lambda family, **changes: losses_alone(make(family, "eager", **changes), batches(plan, 8))
    )


@pytest.fixture(autouse=True)
def one_thread():
    """Small matrices are faster without threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


class Part:
    """A part of a row: its tokens as they are in the batch, and which of them are in the loss, from
    the corpus.
    """

    def __init__(self, plan, batch, index, document):
        ends = np.append(batch.starts_P, batch.ids_BT.size)
        self.ids = batch.ids_BT.ravel()[batch.starts_P[index] : ends[index + 1]]
        self.source = plan.mixture.names[batch.groups_P[index]]
        self.is_padding = document == PADDING
        self.in_loss = np.arange(len(self.ids)) > 0


def parts_of(plan, rank_rows, step):
    """Each micro-batch of a step with every part in a group of its own, and these parts."""
    places = plan.row_ids_of_rank(rank_rows, step)
    streams = plan.streams
    rows = assemble([streams[name] for name in places.names], places)
    shards_P = np.repeat(places.shards_R, np.diff(rows.parts_R1))
    at = 0
    for batch in step_batch(plan, rank_rows, step).micro_batches:
        parts = []
        for index in range(len(batch.starts_P)):
            part = Part(plan, batch, index, rows.documents_P[at])
            if part.source in ("chat", "cut") and not part.is_padding:
                stream = streams[part.source]
                shard = stream._shard(int(shards_P[at]))
                whole = int(shard.lengths[rows.documents_P[at]])
                # tests/corpora.py: the second half of a chat is in the loss; it is never split,
                # only cut at its end.
                part.in_loss = (np.arange(whole) > whole // 2)[: len(part.ids)] & part.in_loss
            if part.is_padding:
                part.in_loss = np.zeros(len(part.ids), bool)
            parts.append(part)
            at += 1
        yield replace(batch, groups_P=np.arange(len(parts))), parts


def batches(plan, micro_batch_rows):
    rank_rows = RankRows(rank=0, ranks=1, rows_per_step=8, micro_batch_rows=micro_batch_rows)
    return [pair for step in range(1, STEPS + 1) for pair in parts_of(plan, rank_rows, step)]


def make(family, attention, dtype="fp32", **changes):
    """Wide weights: with the small ones of a fresh model, attention hardly looks anywhere."""
    spread = {"initializer_range": 0.15}
    built = "eager" if attention == "flash_attention_2" and DEVICE.type == "cpu" else attention
    model = build(
        read_config(None, FAMILIES[family] | spread | changes),
        None,
        dtype=dtype,
        attention=built,
        activation_checkpointing=False,
        terms=LossTerms(),
        options=LossBackendOptions(backend=torch_backend, chunk_bytes=1 << 14),
        seed=1,
        construction=torch.device("cpu"),
    )
    model.lm.config._attn_implementation = attention
    return model.to(DEVICE).train()


def gradient_of(model):
    parts = [p.grad.double().flatten().cpu() for p in model.parameters() if p.grad is not None]
    model.zero_grad()
    return torch.cat(parts)


def forward(model, batch, parts):
    coefficients = [COEFFICIENTS[part.source] for part in parts]
    value, sums_GM = model(to_device(batch, coefficients, DEVICE))
    return value, GroupSums.of(sums_GM).nll_G.tolist()


def packed_losses(model, pairs):
    """The loss sum of each part, and the gradient of all, by bigmix."""
    sums = []
    for batch, parts in pairs:
        value, losses = forward(model, batch, parts)
        value.backward()
        sums += losses
    return sums, gradient_of(model)


def losses_alone(model, pairs):
    """The same, with each part alone through the model's own logits."""
    sums = []
    for part in (part for _, parts in pairs for part in parts):
        ids = torch.from_numpy(part.ids.astype(np.int64)).to(DEVICE)
        in_loss = torch.from_numpy(part.in_loss).to(DEVICE)
        if not in_loss.any():
            sums.append(0.0)
            continue
        logits_TV = model.lm(input_ids=ids[None]).logits[0].float()
        nll = torch.nn.functional.cross_entropy(logits_TV[:-1], ids[1:], reduction="none")
        nll_sum = nll[in_loss[1:]].sum()
        (COEFFICIENTS[part.source] * nll_sum).backward()
        sums.append(nll_sum.item())
    return sums, gradient_of(model)


def differences(packed, alone):
    """The largest relative difference of a document's loss sum, and that of the gradient."""
    (found, gradient), (expected, gradient_alone) = packed, alone
    assert [a == 0 for a in found] == [b == 0 for b in expected]
    worst = max(abs(a - b) / b for a, b in zip(found, expected, strict=True) if b)
    return worst, float((gradient - gradient_alone).norm() / gradient_alone.norm())


def test_the_rows_hold_all_that_is_claimed(plan):
    """Without documents that are cut, padding, masks and short documents the tests below would
    prove less.
    """
    rank_rows = RankRows(rank=0, ranks=1, rows_per_step=8, micro_batch_rows=4)
    parts = [part for _, parts in batches(plan, 4) for part in parts]
    documents = [part for part in parts if not part.is_padding]
    for name in PACKINGS:
        assert sum(part.source == name for part in documents) > 5
        assert any(part.is_padding and part.source == name for part in parts)
    assert any(len(part.ids) == 1 for part in documents)
    assert any(0 < part.in_loss[1:].sum() < len(part.ids) - 1 for part in documents)
    ids = [row for step in (1, 2, 3) for row in plan.row_ids(step)]
    rows = [plan.streams["text"].read(row) for row in ids if row.source == "text"]
    ends = {(row.id.shard, row.id.row, int(row.documents_P[-1])) for row in rows}
    assert any((r.id.shard, r.id.row - 1, int(r.documents_P[0])) in ends for r in rows)
    assert all(int(row.positions_T[0]) == 0 and len(row.ids_T) == 64 for row in rows)
    assert step_batch(plan, rank_rows, 1).micro_batches[0].ids_BT.shape == (4, 64)


@pytest.mark.parametrize("micro_batch_rows", [1, 4])
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("family", FAMILIES)
def test_packed_documents_learn_as_if_alone(plan, alone, family, attention, micro_batch_rows):
    if (family, attention) == ("gemma", "sdpa"):
        pytest.skip("sdpa cannot cap the scores")
    packed = packed_losses(make(family, attention), batches(plan, micro_batch_rows))
    loss, gradient = differences(packed, alone(family))
    assert loss < EXACT and gradient < EXACT, (loss, gradient)


@pytest.mark.slow
@pytest.mark.parametrize("family", WIDE)
def test_packed_documents_learn_as_if_alone_under_flex_attention(plan, alone, family):
    model, pairs = make(family, "flex_attention", **WIDE[family]), batches(plan, 4)
    if DEVICE.type == "cpu":  # torch has no backward of it there
        with torch.no_grad():
            found = [loss for batch, parts in pairs for loss in forward(model, batch, parts)[1]]
        gradient_alone = alone(family, **WIDE[family])[1]
        loss, _ = differences((found, gradient_alone), alone(family, **WIDE[family]))
        assert loss < EXACT
        return
    loss, gradient = differences(packed_losses(model, pairs), alone(family, **WIDE[family]))
    assert loss < EXACT and gradient < EXACT, (loss, gradient)


@pytest.mark.skipif(
    DEVICE.type != "cuda" or not is_flash_attn_2_available(), reason="needs a GPU and flash-attn"
)
@pytest.mark.parametrize("micro_batch_rows", [1, 4])
@pytest.mark.parametrize("family", FAMILIES)
def test_packed_documents_learn_as_if_alone_under_flash_attention(
    plan, alone, family, micro_batch_rows
):
    model = make(family, "flash_attention_2", dtype="bf16")
    packed = packed_losses(model, batches(plan, micro_batch_rows))
    loss, gradient = differences(packed, alone(family, dtype="bf16"))
    assert loss < BF16 and gradient < BF16, (loss, gradient)


def attend(query_BTHE, key_BTKE, value_BTKE, **options):
    """flash_attn_func by its documentation, from whole matrices."""
    times = query_BTHE.shape[2] // key_BTKE.shape[2]
    query, key, value = (x.transpose(1, 2) for x in (query_BTHE, key_BTKE, value_BTKE))
    scores = (
        query
        @ key.repeat_interleave(times, 1).transpose(2, 3)
        * (options.get("softmax_scale") or query.shape[-1] ** -0.5)
    )
    if options.get("softcap"):
        scores = (scores / options["softcap"]).tanh() * options["softcap"]
    at = torch.arange(query.shape[2])
    back = at[:, None] - at[None]
    left = options.get("window_size", (-1, -1))[0]
    seen = (back >= 0) & ((back <= left) if left >= 0 else True)
    weights = scores.masked_fill(~seen, -torch.inf).softmax(-1)
    return (weights @ value.repeat_interleave(times, 1)).transpose(1, 2)


def attend_by_length(query_XHE, key_XKE, value_XKE, *, cu_seqlens_q, cu_seqlens_k, **options):
    """flash_attn_varlen_func by its documentation."""
    assert torch.equal(cu_seqlens_q, cu_seqlens_k)
    lengths = cu_seqlens_q.diff().tolist()
    runs = zip(*(x[None].split(lengths, 1) for x in (query_XHE, key_XKE, value_XKE)), strict=True)
    return torch.cat([attend(*run, **options) for run in runs], 1)[0]


@pytest.mark.skipif(DEVICE.type == "cuda", reason="the kernels themselves are tested")
@pytest.mark.parametrize("micro_batch_rows", [1, 4])
@pytest.mark.parametrize("family", FAMILIES)
def test_flash_attention_knows_where_documents_begin(
    plan, alone, monkeypatch, family, micro_batch_rows
):
    """All of transformers' own path runs, with slow kernels in place of flash-attn's."""

    def options(**given):
        left = given["sliding_window"]
        window = (-1, -1) if left is None or given["key_length"] <= left else (left - 1, left - 1)
        names = ("softmax_scale", "softcap")
        return {name: given.get(name) for name in names} | {"window_size": window}

    kernels = (attend, attend_by_length, None, None, None)
    monkeypatch.setattr(
        modeling_flash_attention_utils,
        "lazy_import_flash_attention",
        lambda *_, **__: (kernels, (options, None)),
    )
    # It asks for a linear layer to know what fp32 is to be cast to, and GPT-2's attention has none.
    monkeypatch.setattr(flash_attention, "get_target_dtype", lambda *_: None)
    packed = packed_losses(make(family, "flash_attention_2"), batches(plan, micro_batch_rows))
    loss, gradient = differences(packed, alone(family))
    assert loss < EXACT and gradient < EXACT, (loss, gradient)


def test_a_model_that_looks_across_documents_would_be_seen(plan, alone):
    """With a mask of ones, as many trainers give it, the same comparison is off by a thousand times
    its limit.
    """
    model = make("llama", "sdpa")
    body = model.lm.base_model
    model.hidden = lambda ids_BT, _: (
        body(input_ids=ids_BT, attention_mask=torch.ones_like(ids_BT)).last_hidden_state
    )
    loss, gradient = differences(packed_losses(model, batches(plan, 4)), alone("llama"))
    assert loss > 1000 * EXACT and gradient > 1000 * EXACT
