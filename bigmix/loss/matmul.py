"""The matrix products of the loss, left @ right^T, by the fastest way of the device.

torch sends fp32 products on a CPU to MKL, which takes 2.7 times as long as oneDNN on CPUs that are
not Intel's. oneDNN, which computes torch's bf16 products and those of compiled code, is called here
as compiled code calls it.
"""

import torch
from torch import Tensor

from bigmix.loss.chunks import slices

_ONEDNN = getattr(torch.ops.mkldnn, "_linear_pointwise", None)
# oneDNN allocates its result; a large one is made and copied in blocks of this many elements.
_BLOCK = 1 << 20


def times_transposed(left_CK: Tensor, right_VK: Tensor) -> Tensor:
    """left @ right^T [C, V]."""
    if _is_for_onednn(left_CK):
        return _by_onednn(left_CK, right_VK)
    return left_CK @ right_VK.T


def times_transposed_into(out_CV: Tensor, left_CK: Tensor, right_VK: Tensor) -> None:
    """out = left @ right^T, in the dtype of `out_CV`."""
    if out_CV.dtype != left_CK.dtype:
        torch.mm(left_CK, right_VK.T, out_dtype=out_CV.dtype, out=out_CV)
    elif _is_for_onednn(left_CK):
        block_size = max(16, _BLOCK // len(left_CK))
        for part in slices(len(right_VK), block_size):
            out_CV[:, part] = _by_onednn(left_CK, right_VK[part])
    else:
        torch.mm(left_CK, right_VK.T, out=out_CV)


def gives_fp32(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether the device's product of `dtype` can give fp32 that is not rounded to `dtype`."""
    return dtype == torch.float32 or device.type == "cuda"


def _by_onednn(left_CK: Tensor, right_VK: Tensor) -> Tensor:
    assert _ONEDNN is not None
    result: Tensor = _ONEDNN(left_CK, right_VK, None, "none", [], "")
    return result


def _is_for_onednn(left: Tensor) -> bool:
    return (
        left.device.type == "cpu"
        and left.dtype == torch.float32
        and len(left) > 0
        and _ONEDNN is not None
        and bool(torch.backends.mkldnn.is_available())  # type: ignore[no-untyped-call]
        and bool(torch.backends.mkl.is_available())  # type: ignore[no-untyped-call]
    )
