"""The chunked loss equals dense cross entropy in value, in its sums and in all its gradients."""

import pytest
import torch

from bigmix.loss.mixed import Computing, mixed_loss
from bigmix.loss.terms import GroupSums, LogitRule, LossTokens

GROUPS = 3


def inputs(tokens, hidden=24, vocabulary=101, dtype=torch.float32, scale=1.0, seed=0):
    draw = torch.Generator().manual_seed(seed)
    return (
        (torch.randn(tokens, hidden, generator=draw) * scale).to(dtype).requires_grad_(),
        (torch.randn(vocabulary, hidden, generator=draw) * 0.3).to(dtype).requires_grad_(),
        (torch.randn(vocabulary, generator=draw) * 0.1).to(dtype).requires_grad_(),
        LossTokens(
            positions_N=None,
            labels_N=torch.randint(vocabulary, (tokens,), generator=draw),
            groups_N=torch.randint(GROUPS, (tokens,), generator=draw),
            coefficients_N=torch.rand(tokens, generator=draw),
            num_groups=GROUPS,
        ),
    )


def dense(hidden, head, bias, tokens, rule):
    """The slow obvious way, in fp64: all logits at once, autograd for the gradients."""
    copies = [
        None if t is None else t.detach().double().requires_grad_() for t in (hidden, head, bias)
    ]
    logits = copies[0] @ copies[1].T
    logits = (logits if bias is None else logits + copies[2]) * rule.scale
    if rule.softcap is not None:
        logits = rule.softcap * torch.tanh(logits / rule.softcap)
    nll = torch.nn.functional.cross_entropy(logits, tokens.labels_N, reduction="none")
    value = (nll * tokens.coefficients_N.double()).sum()
    value.backward()
    sums = torch.stack([nll[tokens.groups_N == g].sum() for g in range(GROUPS)])
    return value, sums, [None if c is None else c.grad for c in copies]


def error(found, expected):
    return float((found.detach().double() - expected.detach()).norm() / expected.detach().norm())


@pytest.mark.parametrize("tokens", [1, 7, 64, 203])
@pytest.mark.parametrize(
    "rule",
    [LogitRule(), LogitRule(softcap=3.0), LogitRule(scale=0.25), LogitRule(scale=2.0, softcap=5.0)],
)
@pytest.mark.parametrize("with_bias", [True, False])
def test_the_loss_and_its_gradients_equal_a_dense_reference(tokens, rule, with_bias):
    hidden, head, bias, loss_tokens = inputs(tokens)
    bias = bias if with_bias else None
    value, sums, gradients = dense(hidden, head, bias, loss_tokens, rule)
    for rows in (16, 50, 1000):
        for tensor in (hidden, head, bias):
            if tensor is not None:
                tensor.grad = None
        found, found_sums = mixed_loss(
            hidden,
            head,
            bias,
            loss_tokens,
            rule=rule,
            computing=Computing(chunk_bytes=rows * 4 * 101),
        )
        (found * 3).backward()
        assert error(found, value) < 1e-6
        assert error(GroupSums.of(found_sums).nll_G, sums) < 1e-6
        for tensor, gradient in zip((hidden, head, bias), gradients, strict=True):
            if tensor is not None:
                assert error(tensor.grad / 3, gradient) < 1e-6


def test_bf16_gradients_are_as_near_as_a_dense_bf16_loss_in_any_number_of_chunks():
    hidden, head, _, tokens = inputs(512, dtype=torch.bfloat16)
    _, _, gradients = dense(hidden, head, None, tokens, LogitRule())
    for rows in (16, 1000):
        hidden.grad = head.grad = None
        value, _ = mixed_loss(
            hidden,
            head,
            None,
            tokens,
            rule=LogitRule(),
            computing=Computing(chunk_bytes=rows * 4 * 101),
        )
        value.backward()
        assert error(hidden.grad, gradients[0]) < 6e-3
        assert error(head.grad, gradients[1]) < 6e-3


def test_no_loss_token_gives_zero_and_zero_gradients():
    hidden, head, bias, tokens = inputs(0)
    value, sums = mixed_loss(
        hidden, head, bias, tokens, rule=LogitRule(), computing=Computing(chunk_bytes=1 << 20)
    )
    value.backward()
    assert value == 0 and not sums.any()
    assert not head.grad.any() and not bias.grad.any() and hidden.grad.shape == (0, 24)


def test_extreme_logits_stay_finite():
    hidden, head, _, tokens = inputs(40, scale=1e4)
    value, sums = mixed_loss(
        hidden, head, None, tokens, rule=LogitRule(), computing=Computing(chunk_bytes=1 << 20)
    )
    value.backward()
    assert all(torch.isfinite(t).all() for t in (value, sums, hidden.grad, head.grad))


def test_without_gradient_none_is_formed():
    hidden, head, _, tokens = inputs(40)
    expected, _, _ = dense(hidden, head, None, tokens, LogitRule())
    with torch.no_grad():
        value, _ = mixed_loss(
            hidden, head, None, tokens, rule=LogitRule(), computing=Computing(chunk_bytes=1 << 20)
        )
    assert not value.requires_grad
    assert error(value, expected) < 1e-6


def test_a_frozen_head_gets_no_gradient():
    hidden, head, _, tokens = inputs(40)
    head.requires_grad_(False)
    value, _ = mixed_loss(
        hidden, head, None, tokens, rule=LogitRule(), computing=Computing(chunk_bytes=1 << 20)
    )
    value.backward()
    assert head.grad is None and hidden.grad is not None
