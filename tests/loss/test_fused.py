"""The fused loss equals the dense formula in value, in its sums and in all its gradients, and never
holds T x V.
"""

from dataclasses import dataclass, replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from bigmix.errors import BadInput
from bigmix.loss import gradients as gradients_module
from bigmix.loss.backend import backend_of, check_backend, choose_backend
from bigmix.loss.chunks import LossShape, chunk_tokens, even_slices
from bigmix.loss.fused import mixed_loss
from bigmix.loss.gradients import scaled
from bigmix.loss.requests import Backend, LossBackendOptions
from bigmix.loss.terms import (
    GroupSums,
    LogitRule,
    LossTerms,
    LossTokens,
    ReferenceStates,
    dense_loss,
    tokens_of_labels,
)
from bigmix.loss.torch_kernel import torch_backend
from bigmix.types import IGNORE, Choice

GROUPS, HIDDEN, VOCABULARY = 3, 24, 101
PLAIN, NO_TERMS = LogitRule(), LossTerms()
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@dataclass(frozen=True, kw_only=True)
class Case:
    """Inputs of a loss. The reference, where there is one, is on the first tokens."""

    hidden: torch.Tensor
    head: torch.Tensor
    bias: torch.Tensor | None
    tokens: LossTokens
    rule: LogitRule = PLAIN
    terms: LossTerms = NO_TERMS
    reference: ReferenceStates | None = None
    backend: Backend = torch_backend

    def leaves(self):
        return [t for t in (self.hidden, self.head, self.bias) if t is not None]

    def run(self, rows=1000, factor=1.0):
        """Value, sums and gradients by the fused loss, with at most `rows` tokens in a chunk."""
        for tensor in self.leaves():
            tensor.grad = None
        itemsize = self.head.dtype.itemsize * (1 if self.reference is None else 2)
        value, sums = mixed_loss(
            self.hidden,
            self.head,
            self.bias,
            self.tokens,
            rule=self.rule,
            terms=self.terms,
            reference=self.reference,
            options=LossBackendOptions(
                backend=self.backend, chunk_bytes=rows * itemsize * len(self.head)
            ),
        )
        (value * factor).backward()
        return value.detach(), GroupSums.of(sums), [t.grad for t in self.leaves()]


@pytest.fixture(params=["torch", "triton"])
def backend(request):
    """Each backend; without a GPU, triton's in its interpreter."""
    if request.param == "triton":
        pytest.importorskip("triton")
    return backend_of(request.param)


def case(
    kept=50,
    positions=70,
    dtype=torch.float32,
    scale=1.0,
    seed=0,
    bias=True,
    anchored=None,
    hidden=HIDDEN,
    vocabulary=VOCABULARY,
    groups=GROUPS,
    **changes,
):
    """Random inputs: `kept` loss tokens anywhere among `positions`, the first `anchored` of them
    with a reference.
    """
    draw = torch.Generator().manual_seed(seed)

    def normal(*shape, times=1.0):
        return (torch.randn(*shape, generator=draw) * times).to(DEVICE, dtype)

    tokens = LossTokens(
        positions_N=torch.randperm(positions, generator=draw)[:kept].to(DEVICE),
        labels_N=torch.randint(vocabulary, (kept,), generator=draw).to(DEVICE),
        groups_N=torch.randint(groups, (kept,), generator=draw).to(DEVICE),
        coefficients_N=torch.rand(kept, generator=draw).to(DEVICE),
        num_groups=groups,
    )
    reference = None
    if anchored is not None:
        reference = ReferenceStates(
            hidden_KD=normal(anchored, 2 * hidden),
            head_VD=normal(vocabulary, 2 * hidden, times=0.3),
            bias_V=None,
            rule=LogitRule(scale=0.5),
            coefficients_K=torch.rand(anchored, generator=draw).to(DEVICE),
        )
    return Case(
        hidden=normal(positions, hidden, times=scale).requires_grad_(),
        head=normal(vocabulary, hidden, times=0.3).requires_grad_(),
        bias=normal(vocabulary, times=0.1).requires_grad_() if bias else None,
        tokens=tokens,
        reference=reference,
        **changes,
    )


def dense(given_case, dtype=torch.float64):
    """The slow obvious way: all logits at once, autograd for the gradients."""
    c = given_case
    copies = [t.detach().to(dtype).requires_grad_() for t in c.leaves()]
    kept = copies[0] if c.tokens.positions_N is None else copies[0][c.tokens.positions_N]
    outputs = (kept @ copies[1].T).to(torch.promote_types(dtype, torch.float32))
    reference = {}
    if c.reference is not None:
        reference_outputs = c.reference.hidden_KD.double() @ c.reference.head_VD.double().T
        reference = {
            "reference_logits_KV": c.reference.rule.logits(reference_outputs),
            "reference_coefficients_K": c.reference.coefficients_K,
        }
    found = dense_loss(
        c.rule.logits(outputs if c.bias is None else outputs + copies[2]),
        c.tokens.labels_N,
        c.tokens.coefficients_N,
        c.terms,
        **reference,
    )
    value = found.objective_N.sum()
    value.backward()
    one_hot = torch.nn.functional.one_hot(c.tokens.groups_N, c.tokens.num_groups).to(outputs.dtype)
    sums = GroupSums.of(one_hot.T @ found.statistics_NM)
    return value.detach(), sums, [t.grad for t in copies]


def error(found, expected):
    return float(
        (found.double() - expected.double()).norm() / expected.double().norm().clamp(1e-30)
    )


def assert_equal(found, expected, factor=1.0, within=2e-6):
    assert error(found[0], expected[0]) < within
    for name in ("tokens_G", "nll_G", "hits_G", "z_G", "entropy_G", "kl_G"):
        assert error(getattr(found[1], name), getattr(expected[1], name)) < within, name
    for ours, theirs in zip(found[2], expected[2], strict=True):
        assert error(ours / factor, theirs) < within


@pytest.mark.parametrize("kept", [1, 7, 64, 203])
@pytest.mark.parametrize(
    "rule",
    [PLAIN, LogitRule(softcap=3.0), LogitRule(scale=0.25), LogitRule(scale=2.0, softcap=5.0)],
)
@pytest.mark.parametrize("with_bias", [True, False])
@pytest.mark.parametrize("anchored", [None, 0, 0.4, 1.0])
def test_the_loss_and_its_gradients_equal_a_dense_reference(kept, rule, with_bias, anchored):
    for terms in (
        LossTerms(),
        LossTerms(z_loss=0.01),
        LossTerms(label_smoothing=0.1, z_loss=1e-3, entropy=True),
    ):
        count = None if anchored is None else int(anchored * kept)
        inputs = case(kept, 230, bias=with_bias, rule=rule, terms=terms, anchored=count, seed=kept)
        expected = dense(inputs)
        for rows in (16, 50, 1000):
            assert_equal(inputs.run(rows, factor=3.0), expected, factor=3.0)


@pytest.mark.parametrize("kept", [0, 1, 37])
@pytest.mark.parametrize("rule", [PLAIN, LogitRule(scale=2.0, softcap=5.0)])
@pytest.mark.parametrize("anchored", [None, 12])
def test_each_backend_gives_the_dense_result(backend, kept, rule, anchored):
    terms = LossTerms(label_smoothing=0.1, z_loss=1e-3, entropy=True)
    count = None if anchored is None else min(kept, anchored)
    inputs = case(kept, 50, rule=rule, terms=terms, anchored=count, backend=backend)
    assert_equal(inputs.run(16), dense(inputs), within=5e-6)


@settings(max_examples=60, deadline=None)
@given(
    kept=st.integers(0, 90),
    spare=st.integers(0, 40),
    vocabulary=st.integers(2, 300),
    hidden=st.integers(1, 40),
    groups=st.integers(1, 5),
    rows=st.integers(16, 64),
    anchored=st.floats(0, 1),
    seed=st.integers(0, 99),
)
def test_any_sizes_give_the_dense_result(
    kept, spare, vocabulary, hidden, groups, rows, anchored, seed
):
    inputs = case(
        kept,
        kept + spare,
        hidden=hidden,
        vocabulary=vocabulary,
        groups=groups,
        seed=seed,
        anchored=int(anchored * kept),
        terms=LossTerms(label_smoothing=0.2, z_loss=1e-3),
    )
    # Tokens predicted with near certainty have gradients of p - 1, nearly 0, whose leading digits
    # cancel.
    assert_equal(inputs.run(rows), dense(inputs), within=2e-4)


def test_labels_that_are_ignored_are_left_out():
    inputs = case(40, 40)
    labels = torch.full((90,), IGNORE, device=DEVICE)
    draw = torch.Generator().manual_seed(1)
    where = torch.randperm(90, generator=draw)[:40].sort().values.to(DEVICE)
    labels[where] = inputs.tokens.labels_N
    groups = torch.zeros(90, dtype=torch.long, device=DEVICE)
    groups[where] = inputs.tokens.groups_N
    table = torch.tensor([0.5, 0.25, 2.0], device=DEVICE)
    tokens = tokens_of_labels(labels, table, groups)
    assert torch.equal(tokens.positions_N, where)
    assert torch.equal(tokens.labels_N, inputs.tokens.labels_N)
    assert torch.equal(tokens.coefficients_N, table[inputs.tokens.groups_N])
    assert len(tokens_of_labels(torch.full((9,), IGNORE, device=DEVICE), table)) == 0


@pytest.mark.parametrize("anchored", [None, 0])
def test_no_loss_token_gives_zero_and_zero_gradients(anchored, backend):
    inputs = case(0, 9, anchored=anchored, backend=backend)
    value, sums, found = inputs.run()
    assert value == 0 and not any(getattr(sums, name).any() for name in sums.__slots__)
    for gradient, leaf in zip(found, inputs.leaves(), strict=True):
        assert gradient.shape == leaf.shape and not gradient.any()


def test_positions_outside_the_loss_change_nothing_bit_for_bit(backend):
    inputs = case(50, 70, backend=backend)
    value, _, found = inputs.run()
    others = torch.ones(70, dtype=torch.bool)
    others[inputs.tokens.positions_N] = False
    with torch.no_grad():
        inputs.hidden[others] = float("nan")
    again, _, gradients = inputs.run()
    assert torch.equal(value, again) and torch.equal(found[1], gradients[1])
    assert not gradients[0][others].any()


def test_the_order_of_the_tokens_changes_rounding_alone():
    inputs = case(64, 64)
    expected = inputs.run(16)
    order = torch.randperm(64, generator=torch.Generator().manual_seed(7))
    t = inputs.tokens
    shuffled = replace(
        t,
        positions_N=t.positions_N[order],
        labels_N=t.labels_N[order],
        groups_N=t.groups_N[order],
        coefficients_N=t.coefficients_N[order],
    )
    assert_equal(replace(inputs, tokens=shuffled).run(16), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_two_runs_are_equal_bit_for_bit(dtype, backend):
    inputs = case(
        90, 130, dtype=dtype, anchored=40, terms=LossTerms(label_smoothing=0.1), backend=backend
    )
    first, again = inputs.run(32), inputs.run(32)
    assert torch.equal(first[0], again[0])
    for one, other in zip(first[2], again[2], strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("size", [1e2, 1e4])
def test_extreme_logits_are_exact_and_finite(size, backend):
    """Logits of about +-size: exp would overflow at 89, and most probabilities are 0."""
    inputs = case(40, 40, anchored=20, terms=LossTerms(z_loss=1e-9), bias=False, backend=backend)
    with torch.no_grad():
        outputs = inputs.hidden @ inputs.head.T
        inputs.hidden.mul_(size / outputs.abs().max())
        inputs.reference.hidden_KD.mul_(size / 5)
    found, expected = inputs.run(16), dense(inputs)
    assert_equal(found, expected, within=2e-3 if size > 1e3 else 1e-4)
    assert all(torch.isfinite(gradient).all() for gradient in found[2])


def naive_bf16(inputs):
    """What is usually done: bf16 logits, cross entropy in fp32, autograd."""
    return dense(inputs, dtype=torch.bfloat16)


@pytest.mark.parametrize(("kept", "vocabulary"), [(256, 101), (512, 3000), (1000, 500)])
def test_bf16_gradients_are_no_less_exact_than_those_of_a_dense_bf16_loss(kept, vocabulary):
    inputs = case(kept, kept, dtype=torch.bfloat16, bias=False, hidden=64, vocabulary=vocabulary)
    expected, naive = dense(inputs), naive_bf16(inputs)
    for rows in (16, 64, 1000):
        value, _, found = inputs.run(rows)
        assert abs(float(value / expected[0]) - 1) < 2e-4
        for ours, theirs, exact in zip(found, naive[2], expected[2], strict=True):
            assert error(ours, exact) < 1.05 * error(theirs, exact)


def test_the_head_gradient_in_bf16_does_not_drift_with_the_number_of_chunks():
    inputs = case(1024, 1024, dtype=torch.bfloat16, bias=False)
    exact = dense(inputs)[2][1]
    one, many = (error(inputs.run(rows)[2][1], exact) for rows in (1024, 16))
    assert many < 1.1 * one


class LargestTensor(TorchDispatchMode):
    """The size in fp32 elements of the largest memory that an operation makes; the `given` tensors
    do not count.
    """

    def __init__(self, *given):
        super().__init__()
        self.elements = 0
        self.given = {t.untyped_storage().data_ptr() for t in given if t is not None}

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        result = function(*arguments, **(options or {}))
        outputs = result if isinstance(result, (list, tuple)) else [result]
        storages = [t.untyped_storage() for t in outputs if isinstance(t, torch.Tensor)]
        made = [s.nbytes() // 4 for s in storages if s.data_ptr() not in self.given]
        self.elements = max([self.elements, *made])
        return result


def test_nothing_of_the_size_of_all_logits_exists_and_without_gradient_no_gradient_does():
    inputs = case(640, 640, hidden=64, vocabulary=512, bias=False)
    options = LossBackendOptions(backend=torch_backend, chunk_bytes=32 * 4 * 512)
    arguments = (inputs.hidden.detach(), inputs.head.detach(), None, inputs.tokens)
    with LargestTensor(*arguments[:2]) as evaluated, torch.no_grad():
        value, _ = mixed_loss(*arguments, options=options)
    assert evaluated.elements == 32 * 512
    arguments[0].requires_grad_()
    arguments[1].requires_grad_()
    with LargestTensor(*arguments[:2]) as trained:
        mixed_loss(*arguments, options=options)[0].backward()
    assert trained.elements == max(512 * 64, 640 * 64)
    assert not value.requires_grad
    assert error(value, dense(inputs)[0]) < 1e-6


def test_a_frozen_head_gets_no_gradient(backend):
    inputs = case(40, 40, bias=False, backend=backend)
    expected = dense(inputs)[2][0]
    inputs.head.requires_grad_(False)
    with LargestTensor(*inputs.leaves()) as seen:
        _, _, found = inputs.run(16)
    assert found[1] is None
    assert error(found[0], expected) < 1e-6
    assert seen.elements < inputs.head.numel()


def test_gradients_of_two_uses_add_up():
    one, other = case(30, 30), case(50, 60, seed=2)
    other = replace(other, head=one.head, bias=one.bias)
    expected = [a + b for a, b in zip(dense(one)[2][1:], dense(other)[2][1:], strict=True)]
    first, _ = mixed_loss(one.hidden, one.head, one.bias, one.tokens)
    second, _ = mixed_loss(other.hidden, one.head, one.bias, other.tokens)
    (2 * first).backward()
    (2 * second).backward()
    assert error(one.head.grad, 2 * expected[0]) < 1e-6
    assert error(one.bias.grad, 2 * expected[1]) < 1e-6


def test_a_second_backward_is_refused_with_the_reason():
    inputs = case()
    value, _ = mixed_loss(inputs.hidden, inputs.head, inputs.bias, inputs.tokens)
    value.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="a second time"):
        value.backward()


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_under_activation_checkpointing_the_gradients_are_the_same(use_reentrant):
    inputs = case()
    expected = inputs.run()

    def loss(hidden):
        return mixed_loss(hidden * 1.0, inputs.head, inputs.bias, inputs.tokens)[0]

    for leaf in inputs.leaves():
        leaf.grad = None
    checkpoint(loss, inputs.hidden, use_reentrant=use_reentrant).backward()
    for leaf, gradient in zip(inputs.leaves(), expected[2], strict=True):
        assert error(leaf.grad, gradient) < 1e-6


def test_under_autocast_products_are_bf16_and_sums_and_gradients_of_weights_are_fp32():
    inputs = case(300, 320, bias=False)
    expected = dense(inputs)
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        value, sums, found = inputs.run(32)
    assert value.dtype == torch.float32 and found[1].dtype == torch.float32
    assert abs(float(value / expected[0]) - 1) < 1e-3
    assert torch.equal(sums.tokens_G.double(), expected[1].tokens_G)
    for ours, exact in zip(found, expected[2], strict=True):
        assert 1e-5 < error(ours, exact) < 1e-2  # bf16 and no worse


@pytest.mark.parametrize("shape", [(1, 1), (3, 5), (40, 7), (64, 64), (1000, 3)])
def test_a_gradient_is_narrowed_in_its_own_memory(shape, monkeypatch):
    monkeypatch.setattr(gradients_module, "_BLOCK", 16)
    wide = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    expected = (wide * 3).bfloat16()
    before = wide.data_ptr()
    narrow = scaled(wide, torch.tensor(3.0), torch.bfloat16)
    assert torch.equal(narrow, expected)
    assert narrow.data_ptr() == before and narrow.is_contiguous()


def test_chunks_take_each_token_once_and_are_never_too_large():
    for tokens in [0, 1, 15, 16, 17, 100, 129, 1000]:
        for most in (16, 20, 64, 1000):
            slices = even_slices(tokens, most)
            assert [i for s in slices for i in range(s.start, s.stop)] == list(range(tokens))
            assert all(s.stop - s.start <= most for s in slices)
            assert len(slices) <= -(-tokens // (most - most % 16))


def test_a_chunk_is_an_eighth_of_the_gradients_or_what_is_given():
    sizes = LossShape(
        num_tokens=4096,
        hidden_size=512,
        vocabulary_size=128256,
        hidden_bytes=4,
        logit_bytes=4,
        device_type="cpu",
        device_bytes=0,
    )
    gradients = 4 * 512 * (128256 + 4096)
    assert chunk_tokens(sizes) == gradients // 8 // (4 * 128256)
    # 8 MiB is never too much.
    small = replace(sizes, hidden_size=64)
    assert chunk_tokens(replace(small, vocabulary_size=32000)) == (8 << 20) // (4 * 32000)
    assert chunk_tokens(replace(small, vocabulary_size=2048)) == 256
    assert chunk_tokens(replace(sizes, hidden_size=4096)) == 256  # more is no faster
    assert chunk_tokens(sizes, 1 << 30) == (1 << 30) // (4 * 128256)
    gpu = replace(sizes, device_type="cuda", device_bytes=80 << 30, hidden_bytes=2)
    assert chunk_tokens(gpu) == (80 << 30) // 64 // (4 * 128256)
    assert chunk_tokens(replace(gpu, vocabulary_size=32000, hidden_size=64)) == 4096


def test_what_does_not_fit_together_is_refused():
    inputs = case(50, 70, anchored=20)
    good = {"reference": inputs.reference}
    hidden, head, bias, tokens = inputs.hidden, inputs.head, inputs.bias, inputs.tokens
    with pytest.raises(ValueError, match="flatten batch and time"):
        mixed_loss(hidden[None], head, bias, tokens)
    with pytest.raises(ValueError, match="bias is"):
        mixed_loss(hidden, head, bias[1:], tokens)
    with pytest.raises(ValueError, match="50 labels, but {'groups_N': 49}"):
        mixed_loss(hidden, head, bias, replace(tokens, groups_N=tokens.groups_N[1:]))
    with pytest.raises(ValueError, match="one vocabulary"):
        mixed_loss(hidden, head[1:], bias[1:], tokens, **good)
    with pytest.raises(ValueError, match="first K of them"):
        reference = replace(inputs.reference, coefficients_K=torch.ones(3))
        mixed_loss(hidden, head, bias, tokens, reference=reference)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rule", [PLAIN, LogitRule(scale=0.5, softcap=8.0)])
def test_a_backend_that_computes_something_else_is_refused(dtype, rule):
    options = {
        "rule": rule,
        "terms": LossTerms(label_smoothing=0.1, z_loss=1e-3),
        "dtype": dtype,
        "device": torch.device("cpu"),
    }
    for mode in ("accumulate", "recompute"):
        check_backend(LossBackendOptions(backend=torch_backend, head_gradient=mode), **options)

    def a_little_wrong(work):
        columns = torch_backend(work)
        if work.gradient_CV is not None:
            work.gradient_CV[3] *= 1.5
        return columns

    with pytest.raises(BadInput, match="differs from plain autograd by .*loss.backend=torch"):
        check_backend(LossBackendOptions(backend=a_little_wrong), **options)


def test_the_backend_is_chosen_by_the_device_and_can_be_forced(monkeypatch):
    cpu, gpu = torch.device("cpu"), torch.device("cuda")
    assert choose_backend("auto", cpu) == Choice(value="torch", reason="no GPU")
    assert choose_backend("torch", gpu) == Choice(value="torch", reason="as the recipe says")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: object())
    assert choose_backend("auto", gpu) == Choice(value="triton", reason="a GPU is there")
    assert choose_backend("triton", gpu).value == "triton"
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    with pytest.raises(BadInput, match="the device is cpu; it needs a GPU"):
        choose_backend("triton", cpu)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert choose_backend("auto", gpu) == Choice(value="torch", reason="triton is not installed")
    with pytest.raises(BadInput, match="triton is not installed"):
        choose_backend("triton", gpu)
    assert backend_of("torch") is torch_backend


@pytest.mark.parametrize("mode", ["accumulate", "recompute"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_both_ways_to_the_head_gradient_give_it(mode, dtype):
    inputs = case(
        203,
        230,
        dtype=dtype,
        anchored=77,
        rule=LogitRule(scale=0.5, softcap=5.0),
        terms=LossTerms(label_smoothing=0.1, z_loss=1e-3),
    )
    options = LossBackendOptions(
        backend=torch_backend, chunk_bytes=32 * 4 * 101, head_gradient=mode
    )
    value, _ = mixed_loss(
        inputs.hidden,
        inputs.head,
        inputs.bias,
        inputs.tokens,
        rule=inputs.rule,
        terms=inputs.terms,
        reference=inputs.reference,
        options=options,
    )
    value.backward()
    exact = dense(inputs)
    within = 2e-6 if dtype == torch.float32 else 6e-3
    for leaf, gradient in zip(inputs.leaves(), exact[2], strict=True):
        assert error(leaf.grad, gradient) < within
