"""A wish and a device go in, what computes the rows of a chunk comes out, with the reason for the header."""

import importlib.util
import os
from typing import Literal

import torch

from bigmix.data.records import Choice
from bigmix.errors import BadInput
from bigmix.loss.requests import Backend, Computing, HeadGradient
from bigmix.loss.torch_kernel import torch_rows

Wish = Literal["auto", "triton", "torch"]


def choose_backend(wish: Wish, device: torch.device) -> Choice:
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
                f"loss.backend is triton, and {lacks}; it needs a GPU and the triton package, set loss.backend=auto or torch"
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


def computing_of(
    backend: str, chunk_mib: int | None, head_gradient: HeadGradient = "auto"
) -> Computing:
    """How the loss is computed by a backend of this name, with `chunk_mib` MiB for the logits of a chunk."""
    return Computing(
        backend=backend_of(backend),
        chunk_bytes=None if chunk_mib is None else chunk_mib << 20,
        head_gradient=head_gradient,
    )
