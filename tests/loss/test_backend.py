"""The backend of the loss is the one that the device can run, and a wrong one is refused."""

import pytest
import torch

from bigmix.errors import BadInput
from bigmix.loss.backend import backend_of, check_backend, choose_backend
from bigmix.loss.requests import LossBackendOptions
from bigmix.loss.terms import LogitRule, LossTerms
from bigmix.loss.torch_kernel import torch_backend
from bigmix.types import Choice

PLAIN = LogitRule()


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

    def a_little_wrong(task):
        columns = torch_backend(task)
        if task.gradient_CV is not None:
            task.gradient_CV[3] *= 1.5
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
