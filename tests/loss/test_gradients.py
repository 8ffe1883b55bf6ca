"""Gradients are narrowed within their own memory."""

import pytest
import torch

from bigmix.loss import gradients as gradients_module
from bigmix.loss.gradients import scaled


@pytest.mark.parametrize("shape", [(1, 1), (3, 5), (40, 7), (64, 64), (1000, 3)])
def test_a_gradient_is_narrowed_in_its_own_memory(shape, monkeypatch):
    monkeypatch.setattr(gradients_module, "_BLOCK", 16)
    wide = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    expected = (wide * 3).bfloat16()
    before = wide.data_ptr()
    narrow = scaled(wide, torch.tensor(3.0), torch.bfloat16)
    assert torch.equal(narrow, expected)
    assert narrow.data_ptr() == before and narrow.is_contiguous()
