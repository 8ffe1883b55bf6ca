"""Chooses the backend of the loss, and checks its results on the device at hand.

A backend computes the logits of a chunk into columns and gradients (see `requests`); one whose
results on this device are not those of plain autograd is refused.
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
from bigmix.loss.terms import LogitRule, LossTerms, LossTokens, ReferenceStates, dense_loss
from bigmix.loss.torch_kernel import torch_backend
from bigmix.types import Choice

BackendName = Literal["auto", "triton", "torch"]


def choose_backend(wish: BackendName, device: torch.device) -> Choice:
    """The backend that a wish means on this device, and why: auto is triton on a GPU where it is
    installed, else torch.

    Raises BadInput where the wish is triton and it cannot run: it needs a GPU, or its interpreter
    (TRITON_INTERPRET=1 in the environment), which is slow and for tests.
    """
    installed = importlib.util.find_spec("triton") is not None
    can_run = device.type == "cuda" or os.environ.get("TRITON_INTERPRET") == "1"
    if wish == "torch":
        return Choice(value="torch", reason="as the recipe says")
    if wish == "triton":
        if not installed or not can_run:
            fault = "triton is not installed" if not installed else f"the device is {device.type}"
            raise BadInput(
                f"loss.backend is triton, and {fault}; it needs a GPU and the triton package, set"
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
        return torch_backend
    # Here, not on top: the package may be absent where this backend is not chosen.
    from bigmix.loss.triton_kernel import triton_backend

    return triton_backend


def backend_options_of(
    backend: str, chunk_mib: int | None, head_gradient: HeadGradient = "auto"
) -> LossBackendOptions:
    """The options of a backend by its name.

    `chunk_mib`: MiB for the logits of a chunk; None: by the formula in `chunks`.
    """
    return LossBackendOptions(
        backend=backend_of(backend),
        chunk_bytes=None if chunk_mib is None else chunk_mib << 20,
        head_gradient=head_gradient,
    )


# The vocabulary takes several blocks of a kernel, and its end is odd.
_NUM_TOKENS, _NUM_REFERENCE_TOKENS, _HIDDEN_SIZE, _VOCABULARY_SIZE = 48, 16, 64, 9001
_BYTES_OF_SEVERAL_CHUNKS = 16 * 4 * _VOCABULARY_SIZE
_TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 2e-2}


def check_backend(
    options: LossBackendOptions,
    *,
    rule: LogitRule,
    terms: LossTerms,
    dtype: torch.dtype,
    device: torch.device,
) -> None:
    """Compute a small loss with every part that a run can have, and compare its value and gradients
    with those that autograd derives from the dense formula.

    Kernels are compiled for the GPU that they run on: a wrong one would train on in silence. Raises
    BadInput with the error where it is more than rounding.
    """
    draw = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=draw).to(device, dtype)

    hidden_ND = normal(_NUM_TOKENS, _HIDDEN_SIZE)
    head_VD = normal(_VOCABULARY_SIZE, _HIDDEN_SIZE) * 0.2
    tokens = LossTokens(
        positions_N=None,
        labels_N=torch.randint(_VOCABULARY_SIZE, (_NUM_TOKENS,), generator=draw).to(device),
        groups_N=torch.zeros(_NUM_TOKENS, dtype=torch.int64, device=device),
        coefficients_N=torch.rand(_NUM_TOKENS, generator=draw).to(device),
        num_groups=1,
    )
    reference = ReferenceStates(
        hidden_KD=normal(_NUM_REFERENCE_TOKENS, _HIDDEN_SIZE),
        head_VD=normal(_VOCABULARY_SIZE, _HIDDEN_SIZE) * 0.2,
        bias_V=None,
        rule=rule,
        coefficients_K=torch.rand(_NUM_REFERENCE_TOKENS, generator=draw).to(device),
    )
    leaves = [hidden_ND.requires_grad_(), head_VD.requires_grad_()]
    with torch.enable_grad():
        expected = _dense_objective(hidden_ND, head_VD, tokens, rule, terms, reference)
        expected_gradients = torch.autograd.grad(expected, leaves)
        for chunk_bytes in (options.chunk_bytes, _BYTES_OF_SEVERAL_CHUNKS):
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
            _compare([value, *found], [expected, *expected_gradients], dtype, device)


def _compare(
    found: Sequence[Tensor], expected: Sequence[Tensor], dtype: torch.dtype, device: torch.device
) -> None:
    worst = max(map(_error, found, expected))
    if not worst <= _TOLERANCE[dtype]:
        raise BadInput(
            f"the loss on {device} differs from plain autograd by {worst:.1e} of its gradient, at"
            f" most {_TOLERANCE[dtype]:.0e} is rounding; set loss.backend=torch, or use another"
            " version of torch or triton"
        )


def _dense_objective(
    hidden_ND: Tensor,
    head_VD: Tensor,
    tokens: LossTokens,
    rule: LogitRule,
    terms: LossTerms,
    reference: ReferenceStates,
) -> Tensor:
    """The objective over whole logits in fp32."""
    found = dense_loss(
        rule.logits(hidden_ND.float() @ head_VD.float().T),
        tokens.labels_N,
        tokens.coefficients_N,
        terms,
        reference_logits_KV=rule.logits(reference.hidden_KD.float() @ reference.head_VD.float().T),
        reference_coefficients_K=reference.coefficients_K,
    )
    return found.objective_N.sum()


def _error(found: Tensor, expected: Tensor) -> float:
    return float(
        (found.detach().float() - expected.detach().float()).norm() / expected.detach().norm()
    )
