"""Makes one measurement of a loss in a fresh interpreter.

It is given a task and, as JSON, its arguments; the last line that it prints is a JSON object.

python benchmarks/loss_measure.py contestant '{"name": "bigmix", ...}'
"""

import importlib
import importlib.util
import json
import os
import sys
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import losses
import torch
from contestant import Contestant, Loss
from loss_case import Case, Expected, Inputs, error, reference
from meter import cost
from torch import Tensor

Result = dict[str, Any]
_TINY: dict[str, Any] = {"num_tokens": 64, "hidden_size": 32, "vocabulary_size": 128}
_NUM_GPU_CALLS = 5  # more calls, with other inputs; on a CPU fresh processes repeat the one call
_RATE_SIZE, _NUM_RATE_CALLS = 8192, 20


class _LossAndGradients(NamedTuple):
    """The loss, and its gradients with respect to hidden states and head."""

    loss: Tensor
    hidden_TD: Tensor
    head_VD: Tensor


def _device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def prepare(*, case: Mapping[str, Any], folder: str) -> Result:
    """Make the reference in the folder, unless it exists."""
    wanted = Case(**case)
    path = wanted.path(Path(folder))
    if not path.is_file():
        expected = reference(wanted, _device())
        unfinished = path.with_suffix(".part")
        torch.save(tuple(expected), unfinished)
        unfinished.rename(path)
    return {}


def contestant(
    *, name: str, case: Mapping[str, Any], folder: str, chunk_bytes: int | None = None
) -> Result:
    """Memory, times and errors of one implementation."""
    package = losses.ALL[name]
    if importlib.util.find_spec(package.imported) is None:
        return {"fault": f"not installed: pip install {package.install}"}
    module = importlib.import_module(f"losses.{name}")
    implementation: Contestant = module.CONTESTANT
    loss: Loss = implementation.loss if chunk_bytes is None else module.loss_with(chunk_bytes)
    wanted, device = Case(**case), _device()
    tiny = replace(wanted, **_TINY)
    _with_gradients(loss, tiny.inputs(0, tiny.head(device)))
    head_VD = wanted.head(device)
    if implementation.compiles or device.type == "cuda":
        _with_gradients(loss, wanted.inputs(1, head_VD))
        _forward(loss, wanted.inputs(1, head_VD))
    return {
        **_cost_and_error(loss, wanted, head_VD, Path(folder)),
        "note": implementation.note,
        "versions": {package.distribution: version(package.distribution)},
    }


def _cost_and_error(loss: Loss, case: Case, head_VD: Tensor, folder: Path) -> Result:
    """Memory and errors with inputs 0; times with the same on a CPU, with others on a GPU."""
    device, results = head_VD.device, list[_LossAndGradients]()
    inputs = case.inputs(0, head_VD)
    first = cost(lambda: results.append(_with_gradients(loss, inputs)), device)
    errors = _errors(results.pop(), case.path(folder))
    both, forward = [first], []
    if device.type == "cuda":
        both = []
        for number in range(1, 1 + _NUM_GPU_CALLS):
            other = case.inputs(number, head_VD)
            both.append(cost(partial(_with_gradients, loss, other), device))
    for number in range(1, 1 + (_NUM_GPU_CALLS if device.type == "cuda" else 1)):
        other = case.inputs(number, head_VD)
        forward.append(cost(partial(_forward, loss, other), device))
    return {
        "peak_mib": first.peak_mib,
        "kept_mib": first.kept_mib,
        "forward_peak_mib": forward[0].peak_mib,
        "both_s": median(one.busy_s for one in both),
        "both_wall_s": median(one.wall_s for one in both),
        "forward_s": median(one.busy_s for one in forward),
        "forward_wall_s": median(one.wall_s for one in forward),
        **errors,
    }


def _errors(found: _LossAndGradients, path: Path) -> Result:
    expected = Expected(*torch.load(path, map_location=found.head_VD.device))
    return {
        "loss_error": abs(float(found.loss) - expected.loss) / expected.loss,
        "hidden_error": error(found.hidden_TD, expected.hidden_RD),
        "head_error": error(found.head_VD, expected.head_RD),
    }


def _with_gradients(loss: Loss, inputs: Inputs) -> _LossAndGradients:
    """Forward and backward; the inputs are not changed."""
    hidden_TD = inputs.hidden_TD.detach().requires_grad_()
    head_VD = inputs.head_VD.detach().requires_grad_()
    value = loss(hidden_TD, head_VD, inputs.labels_T)
    value.backward()  # type: ignore[no-untyped-call]
    assert hidden_TD.grad is not None
    assert head_VD.grad is not None
    return _LossAndGradients(value.detach(), hidden_TD.grad, head_VD.grad)


def _forward(loss: Loss, inputs: Inputs) -> None:
    """Forward without gradients."""
    with torch.no_grad():
        loss(inputs.hidden_TD.detach(), inputs.head_VD.detach(), inputs.labels_T)


def machine() -> Result:
    """The device's name; for a GPU also the operations per second of a large product in bf16."""
    device = _device()
    if device.type == "cpu":
        return {"device": "cpu", "name": f"CPU, {torch.get_num_threads()} threads"}
    left, right = (
        torch.randn(_RATE_SIZE, _RATE_SIZE, device=device, dtype=torch.bfloat16) for _ in range(2)
    )
    for _ in range(3):
        left @ right
    many = cost(lambda: [left @ right for _ in range(_NUM_RATE_CALLS)], device)
    rate = _NUM_RATE_CALLS * 2 * _RATE_SIZE**3 / many.busy_s
    return {"device": "cuda", "name": torch.cuda.get_device_name(), "rate": rate}


TASKS: dict[str, Callable[..., Result]] = {
    "prepare": prepare,
    "contestant": contestant,
    "machine": machine,
}


if __name__ == "__main__":
    result = TASKS[sys.argv[1]](**json.loads(sys.argv[2]))
    print(f"\n{json.dumps(result)}", flush=True)
    # Some peers keep threads that never end.
    os._exit(0)
