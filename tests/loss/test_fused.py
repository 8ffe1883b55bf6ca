"""The fused loss equals the dense formula in its value, its sums and all its gradients, and never
holds all logits.
"""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.losses import DEVICE, PLAIN, assert_equal, case, dense, error
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from bigmix.loss.backend import backend_of
from bigmix.loss.fused import mixed_loss
from bigmix.loss.requests import LossBackendOptions
from bigmix.loss.terms import LogitRule, LossTerms, tokens_of_labels
from bigmix.loss.torch_kernel import torch_backend
from bigmix.types import IGNORE


@pytest.fixture(params=["torch", "triton"])
def backend(request):
    """Each backend; without a GPU, triton's in its interpreter."""
    if request.param == "triton":
        pytest.importorskip("triton")
    return backend_of(request.param)


@pytest.mark.parametrize("num_tokens", [1, 7, 64, 203])
@pytest.mark.parametrize(
    "rule",
    [PLAIN, LogitRule(softcap=3.0), LogitRule(scale=0.25), LogitRule(scale=2.0, softcap=5.0)],
)
@pytest.mark.parametrize("with_bias", [True, False])
@pytest.mark.parametrize("referenced", [None, 0, 0.4, 1.0])
def test_the_loss_and_its_gradients_equal_a_dense_reference(
    num_tokens, rule, with_bias, referenced
):
    for terms in (
        LossTerms(),
        LossTerms(z_loss=0.01),
        LossTerms(label_smoothing=0.1, z_loss=1e-3, entropy=True),
    ):
        count = None if referenced is None else int(referenced * num_tokens)
        inputs = case(
            num_tokens,
            230,
            bias=with_bias,
            rule=rule,
            terms=terms,
            num_with_reference=count,
            seed=num_tokens,
        )
        expected = dense(inputs)
        for max_tokens in (16, 50, 1000):
            assert_equal(inputs.run(max_tokens, factor=3.0), expected, factor=3.0)


@pytest.mark.parametrize("num_tokens", [0, 1, 37])
@pytest.mark.parametrize("rule", [PLAIN, LogitRule(scale=2.0, softcap=5.0)])
@pytest.mark.parametrize("referenced", [None, 12])
def test_each_backend_gives_the_dense_result(backend, num_tokens, rule, referenced):
    terms = LossTerms(label_smoothing=0.1, z_loss=1e-3, entropy=True)
    count = None if referenced is None else min(num_tokens, referenced)
    inputs = case(num_tokens, 50, rule=rule, terms=terms, num_with_reference=count, backend=backend)
    assert_equal(inputs.run(16), dense(inputs), within=5e-6)


@settings(max_examples=60, deadline=None)
@given(
    num_tokens=st.integers(0, 90),
    spare=st.integers(0, 40),
    vocabulary=st.integers(2, 300),
    hidden=st.integers(1, 40),
    groups=st.integers(1, 5),
    max_tokens=st.integers(16, 64),
    referenced=st.floats(0, 1),
    seed=st.integers(0, 99),
)
def test_any_sizes_give_the_dense_result(
    num_tokens, spare, vocabulary, hidden, groups, max_tokens, referenced, seed
):
    inputs = case(
        num_tokens,
        num_tokens + spare,
        hidden_size=hidden,
        vocabulary_size=vocabulary,
        num_groups=groups,
        seed=seed,
        num_with_reference=int(referenced * num_tokens),
        terms=LossTerms(label_smoothing=0.2, z_loss=1e-3),
    )
    # Tokens predicted with near certainty have gradients of p - 1, nearly 0, whose leading digits
    # cancel.
    assert_equal(inputs.run(max_tokens), dense(inputs), within=2e-4)


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


@pytest.mark.parametrize("referenced", [None, 0])
def test_no_loss_token_gives_zero_and_zero_gradients(referenced, backend):
    inputs = case(0, 9, num_with_reference=referenced, backend=backend)
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
        90,
        130,
        dtype=dtype,
        num_with_reference=40,
        terms=LossTerms(label_smoothing=0.1),
        backend=backend,
    )
    first, again = inputs.run(32), inputs.run(32)
    assert torch.equal(first[0], again[0])
    for one, other in zip(first[2], again[2], strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("size", [1e2, 1e4])
def test_extreme_logits_are_exact_and_finite(size, backend):
    """Logits of about +-size: exp would overflow at 89, and most probabilities are 0."""
    inputs = case(
        40, 40, num_with_reference=20, terms=LossTerms(z_loss=1e-9), bias=False, backend=backend
    )
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


@pytest.mark.parametrize(("num_tokens", "vocabulary"), [(256, 101), (512, 3000), (1000, 500)])
def test_bf16_gradients_are_no_less_exact_than_those_of_a_dense_bf16_loss(num_tokens, vocabulary):
    inputs = case(
        num_tokens,
        num_tokens,
        dtype=torch.bfloat16,
        bias=False,
        hidden_size=64,
        vocabulary_size=vocabulary,
    )
    expected, naive = dense(inputs), naive_bf16(inputs)
    for max_tokens in (16, 64, 1000):
        value, _, found = inputs.run(max_tokens)
        assert abs(float(value / expected[0]) - 1) < 2e-4
        for ours, theirs, exact in zip(found, naive[2], expected[2], strict=True):
            assert error(ours, exact) < 1.05 * error(theirs, exact)


def test_the_head_gradient_in_bf16_does_not_drift_with_the_number_of_chunks():
    inputs = case(1024, 1024, dtype=torch.bfloat16, bias=False)
    exact = dense(inputs)[2][1]
    one, many = (error(inputs.run(max_tokens)[2][1], exact) for max_tokens in (1024, 16))
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
    inputs = case(640, 640, hidden_size=64, vocabulary_size=512, bias=False)
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


def test_what_does_not_fit_together_is_refused():
    inputs = case(50, 70, num_with_reference=20)
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


@pytest.mark.parametrize("mode", ["accumulate", "recompute"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_both_ways_to_the_head_gradient_give_it(mode, dtype):
    inputs = case(
        203,
        230,
        dtype=dtype,
        num_with_reference=77,
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
