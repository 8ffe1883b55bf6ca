"""Random inputs of the fused loss, and the slow obvious way to compute it."""

from dataclasses import dataclass

import torch

from bigmix.loss.fused import mixed_loss
from bigmix.loss.requests import Backend, LossBackendOptions
from bigmix.loss.terms import (
    GroupSums,
    LogitRule,
    LossTerms,
    LossTokens,
    ReferenceStates,
    dense_loss,
)
from bigmix.loss.torch_kernel import torch_backend

NUM_GROUPS, HIDDEN_SIZE, VOCABULARY_SIZE = 3, 24, 101
PLAIN, NO_TERMS = LogitRule(), LossTerms()
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@dataclass(frozen=True, kw_only=True)
class Case:
    """Inputs of a loss. The reference, where there is one, is for the first tokens."""

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

    def run(self, max_tokens=1000, factor=1.0):
        """Value, sums and gradients by the fused loss, with at most `max_tokens` in a chunk."""
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
                backend=self.backend, chunk_bytes=max_tokens * itemsize * len(self.head)
            ),
        )
        (value * factor).backward()
        return value.detach(), GroupSums.of(sums), [t.grad for t in self.leaves()]


def case(
    num_tokens=50,
    num_positions=70,
    dtype=torch.float32,
    scale=1.0,
    seed=0,
    bias=True,
    num_with_reference=None,
    hidden_size=HIDDEN_SIZE,
    vocabulary_size=VOCABULARY_SIZE,
    num_groups=NUM_GROUPS,
    **changes,
):
    """Random inputs: `num_tokens` loss tokens anywhere among `num_positions`, the first
    `num_with_reference` of them with a reference.
    """
    draw = torch.Generator().manual_seed(seed)

    def normal(*shape, times=1.0):
        return (torch.randn(*shape, generator=draw) * times).to(DEVICE, dtype)

    tokens = LossTokens(
        positions_N=torch.randperm(num_positions, generator=draw)[:num_tokens].to(DEVICE),
        labels_N=torch.randint(vocabulary_size, (num_tokens,), generator=draw).to(DEVICE),
        groups_N=torch.randint(num_groups, (num_tokens,), generator=draw).to(DEVICE),
        coefficients_N=torch.rand(num_tokens, generator=draw).to(DEVICE),
        num_groups=num_groups,
    )
    reference = None
    if num_with_reference is not None:
        reference = ReferenceStates(
            hidden_KD=normal(num_with_reference, 2 * hidden_size),
            head_VD=normal(vocabulary_size, 2 * hidden_size, times=0.3),
            bias_V=None,
            rule=LogitRule(scale=0.5),
            coefficients_K=torch.rand(num_with_reference, generator=draw).to(DEVICE),
        )
    return Case(
        hidden=normal(num_positions, hidden_size, times=scale).requires_grad_(),
        head=normal(vocabulary_size, hidden_size, times=0.3).requires_grad_(),
        bias=normal(vocabulary_size, times=0.1).requires_grad_() if bias else None,
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


def error(found, expected, least=1e-30):
    """The relative error; what is smaller than `least` is compared with `least`."""
    return float(
        (found.double() - expected.double()).norm() / expected.double().norm().clamp(least)
    )


def assert_equal(found, expected, factor=1.0, within=2e-6):
    assert error(found[0], expected[0]) < within
    for name in ("tokens_G", "nll_G", "hits_G", "z_G", "entropy_G"):
        assert error(getattr(found[1], name), getattr(expected[1], name)) < within, name
    # The divergence of nearly equal distributions is made of terms that are far larger than itself.
    assert error(found[1].kl_G, expected[1].kl_G, least=1e-3) < within
    for ours, theirs in zip(found[2], expected[2], strict=True):
        assert error(ours / factor, theirs) < within
