"""A wish and a device go in, what computes the rows of a chunk comes out, with the reason for the
header.

A way of computing the loss goes in; it is refused where its results on this device are not those of
plain autograd.
"""

import importlib.util
import os
from collections.abc import Sequence
from dataclasses import replace
from typing import Literal

import torch
from torch import Tensor

from bigmix.errors import BadInput
from bigmix.loss.fused import mixed_loss
from bigmix.loss.requests import Backend, HeadGradient, LossBackendOptions
from bigmix.loss.terms import LogitRule, LossTerms, LossTokens, ReferenceStates
from bigmix.loss.torch_kernel import torch_rows
from bigmix.types import Choice

BackendName = Literal["auto", "triton", "torch"]


def choose_backend(wish: BackendName, device: torch.device) -> Choice:
    """triton on a GPU where it is installed, else torch.

    Raises BadInput where triton is asked for and cannot run: it needs a GPU, or its interpreter
    (TRITON_INTERPRET=1 in the environment), which is slow and for tests.
    """
    installed = importlib.util.find_spec("triton") is not None
    can_run = device.type == "cuda" or os.environ.get("TRITON_INTERPRET") == "1"
    if wish == "torch":
        return Choice(value="torch", reason="as the recipe says")
    if wish == "triton":
        if not installed or not can_run:
            lacks = "triton is not installed" if not installed else f"the device is {device.type}"
            raise BadInput(
                f"loss.backend is triton, and {lacks}; it needs a GPU and the triton package, set"
                " loss.backend=auto or torch"
            )
        return Choice(value="triton", reason="as the recipe says")
    if device.type != "cuda":
        return Choice(value="torch", reason="no GPU")
    if not installed:
        return Choice(value="torch", reason="triton is not installed")
    return Choice(value="triton", reason="a GPU is there")


def backend_of(name: str) -> Backend:
    """The function of a backend's name, torch or triton."""
    if name == "torch":
        return torch_rows
    # Here, not on top: the package may be absent where this is not chosen.
    from bigmix.loss.triton_kernel import triton_rows

    return triton_rows


def backend_options_of(
    backend: str, chunk_mib: int | None, head_gradient: HeadGradient = "auto"
) -> LossBackendOptions:
    """How the loss is computed by a backend of this name, with `chunk_mib` MiB for the logits of a
    chunk.
    """
    return LossBackendOptions(
        backend=backend_of(backend),
        chunk_bytes=None if chunk_mib is None else chunk_mib << 20,
        head_gradient=head_gradient,
    )


# The vocabulary takes several blocks of a kernel, and its end is odd.
_TOKENS, _ANCHORED, _HIDDEN, _VOCABULARY = 48, 16, 64, 9001
_SEVERAL_CHUNKS = 16 * 4 * _VOCABULARY
_TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 2e-2}


def check_backend(
    options: LossBackendOptions,
    *,
    rule: LogitRule,
    terms: LossTerms,
    dtype: torch.dtype,
    device: torch.device,
) -> None:
    """Compute a small loss with every part that a run can have, and hold its gradients against
    autograd's.

    Kernels are compiled for the GPU they meet: a wrong one would train on in silence. Raises
    BadInput with the error.
    """
    draw = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=draw).to(device, dtype)

    hidden_ND, head_VD = normal(_TOKENS, _HIDDEN), normal(_VOCABULARY, _HIDDEN) * 0.2
    tokens = LossTokens(
        positions_N=None,
        labels_N=torch.randint(_VOCABULARY, (_TOKENS,), generator=draw).to(device),
        groups_N=torch.zeros(_TOKENS, dtype=torch.int64, device=device),
        coefficients_N=torch.rand(_TOKENS, generator=draw).to(device),
        num_groups=1,
    )
    reference = ReferenceStates(
        hidden_KD=normal(_ANCHORED, _HIDDEN),
        head_VD=normal(_VOCABULARY, _HIDDEN) * 0.2,
        bias_V=None,
        rule=rule,
        coefficients_K=torch.rand(_ANCHORED, generator=draw).to(device),
    )
    leaves = [hidden_ND.requires_grad_(), head_VD.requires_grad_()]
    with torch.enable_grad():
        expected = _dense(hidden_ND, head_VD, tokens, rule, terms, reference)
        wanted = torch.autograd.grad(expected, leaves)
        for chunk_bytes in (options.chunk_bytes, _SEVERAL_CHUNKS):
            value, _ = mixed_loss(
                hidden_ND,
                head_VD,
                None,
                tokens,
                rule=rule,
                terms=terms,
                reference=reference,
                options=replace(options, chunk_bytes=chunk_bytes),
            )
            found = torch.autograd.grad(value, leaves)
            _compare([value, *found], [expected, *wanted], dtype, device)


def _compare(
    found: Sequence[Tensor], wanted: Sequence[Tensor], dtype: torch.dtype, device: torch.device
) -> None:
    worst = max(map(_error, found, wanted))
    if not worst <= _TOLERANCE[dtype]:
        raise BadInput(
            f"the loss on {device} differs from plain autograd by {worst:.1e} of its gradient, at"
            f" most {_TOLERANCE[dtype]:.0e} is rounding; set loss.backend=torch, or use another"
            " version of torch or triton"
        )


def _dense(
    hidden_ND: Tensor,
    head_VD: Tensor,
    tokens: LossTokens,
    rule: LogitRule,
    terms: LossTerms,
    reference: ReferenceStates,
) -> Tensor:
    """The objective of `terms` as it is written there."""
    logits_NV = _logits(hidden_ND, head_VD, rule)
    log_p_NV = logits_NV.log_softmax(1)
    nll_N = -log_p_NV.gather(1, tokens.labels_N.unsqueeze(1)).squeeze(1)
    eps = terms.label_smoothing
    each_N = (1 - eps) * nll_N - eps * log_p_NV.mean(1)
    each_N = each_N + terms.z_loss * logits_NV.logsumexp(1).square()
    theirs_KV = _logits(reference.hidden_KD, reference.head_VD, rule)
    log_q_KV = theirs_KV.log_softmax(1)
    kl_K = (log_q_KV.exp() * (log_q_KV - log_p_NV[: len(log_q_KV)])).sum(1)
    return (tokens.coefficients_N * each_N).sum() + (reference.coefficients_K * kl_K).sum()


def _logits(hidden_ND: Tensor, head_VD: Tensor, rule: LogitRule) -> Tensor:
    logits_NV = hidden_ND.float() @ head_VD.float().T * rule.scale
    return logits_NV if rule.softcap is None else rule.softcap * (logits_NV / rule.softcap).tanh()


def _error(found: Tensor, expected: Tensor) -> float:
    return float(
        (found.detach().float() - expected.detach().float()).norm() / expected.detach().norm()
    )
