"""Finds the sizes of a model: its weights, its FLOPs, and what a forward pass keeps for backward.

The model is built on the meta device, where tensors have shapes but no memory, so 70 billion
weights take a second. What autograd keeps is counted tensor by tensor, for any architecture. Only
attention is replaced: a stand-in keeps what the real backend keeps, since on the meta device torch
would choose another backend.

Letters: B rows, T positions, H heads, K key-value heads, E width of a head.
"""

from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers.integrations.sdpa_attention import repeat_kv
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from bigmix.errors import BadInput
from bigmix.model.causal_lm import DTYPES
from bigmix.model.flops import Cost, cost_of

_STAND_IN = "bigmix_plan"


@dataclass(frozen=True, kw_only=True, slots=True)
class Activations:
    """Bytes that the forward pass of the body keeps for backward.

    `total` is all of it; `outside` is the part that belongs to no layer, `layer` that of the
    largest layer, `entrance` the hidden states that enter a layer, `widest` the largest single
    tensor of a layer.
    """

    total: int
    outside: int
    layer: int
    entrance: int
    widest: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Shape:
    """The sizes of a model.

    `matrices` and `vectors` have the number of elements of each parameter, apart because they are
    optimised apart.
    """

    matrices: tuple[int, ...]
    vectors: tuple[int, ...]
    num_layers: int
    hidden_size: int
    vocab_size: int
    is_tied: bool
    cost: Cost | None
    activations: Activations

    @property
    def num_parameters(self) -> int:
        """The number of all weights; tied ones count once."""
        return sum(self.matrices) + sum(self.vectors)


def shape_of(
    config: Any, *, dtype: str, attention: str, micro_batch_rows: int, row_tokens: int
) -> Shape:
    """The sizes of the model that a configuration describes, with a micro-batch of
    `micro_batch_rows` rows of `row_tokens` tokens.

    Raises BadInput where transformers cannot build the model.
    """
    lm = _on_meta(config, dtype)
    body, head = lm.base_model, lm.get_output_embeddings()
    parameters = list(lm.parameters())
    _put_stand_in(lm.config, attention)
    ids_BT = torch.zeros(micro_batch_rows, row_tokens, dtype=torch.int64, device="meta")
    return Shape(
        matrices=tuple(p.numel() for p in parameters if p.dim() >= 2),
        vectors=tuple(p.numel() for p in parameters if p.dim() < 2),
        num_layers=len(_layers(body)),
        hidden_size=head.weight.shape[1],
        vocab_size=head.weight.shape[0],
        is_tied=head.weight is lm.get_input_embeddings().weight,
        cost=cost_of(lm),
        activations=_activations(body.train(), ids_BT),
    )


def _on_meta(config: Any, dtype: str) -> Any:
    try:
        with torch.device("meta"):
            return transformers.AutoModelForCausalLM.from_config(
                config, dtype=DTYPES[dtype], attn_implementation="eager"
            )
    except (OSError, ValueError, ImportError) as error:
        first = str(error).strip().splitlines()[0]
        raise BadInput(
            f"the model {config.model_type} cannot be built ({first}); check model.path or"
            " model.config"
        ) from error


def _activations(body: nn.Module, ids_BT: Tensor) -> Activations:
    """Run the forward pass of the body on the meta device and add up what autograd keeps, each
    storage once, without the weights.
    """
    sizes: dict[Any, int] = {}
    owners: dict[Any, int] = {}
    kept: list[Any] = []  # a storage that is freed could give its address to another
    own = {parameter.untyped_storage()._cdata for parameter in body.parameters()}
    depth = [0]

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in own and storage._cdata not in sizes:
            sizes[storage._cdata], owners[storage._cdata] = storage.nbytes(), depth[0]
            kept.append(storage)
        return tensor

    layers = _layers(body)
    hooks = [
        hook
        for index, layer in enumerate(layers)
        for hook in (
            layer.register_forward_pre_hook(partial(_enter, depth, index + 1)),
            layer.register_forward_hook(partial(_enter, depth, 0)),
        )
    ]
    positions_BT = torch.zeros_like(ids_BT)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        result = body(input_ids=ids_BT, position_ids=positions_BT, use_cache=False)
    for hook in hooks:
        hook.remove()
    by_layer = [0] * (len(layers) + 1)
    for key, size in sizes.items():
        by_layer[owners[key]] += size
    return Activations(
        total=sum(by_layer),
        outside=by_layer[0],
        layer=max(by_layer[1:], default=0),
        entrance=result.last_hidden_state.untyped_storage().nbytes(),
        widest=max((size for key, size in sizes.items() if owners[key]), default=0),
    )


def _enter(depth: list[int], layer: int, *_: Any) -> None:
    depth[0] = layer


def _layers(body: nn.Module) -> list[nn.Module]:
    return [module for module in body.modules() if isinstance(module, GradientCheckpointingLayer)]


def _put_stand_in(config: Any, attention: str) -> None:
    """Replace attention by a backend without a mask function: a mask is made of values, which do
    not exist on the meta device.
    """
    keep = {"eager": _eager, "sdpa": _masked}.get(attention, _fused)
    ALL_ATTENTION_FUNCTIONS.register(_STAND_IN, keep)
    config._attn_implementation = _STAND_IN


def _eager(
    module: Any, query_BHTE: Tensor, key_BKTE: Tensor, value_BKTE: Tensor, *_: Any, **options: Any
) -> tuple[Tensor, None]:
    """The eager backend: the scores of all pairs, as transformers computes them."""
    key_BHTE, value_BHTE = _for_all_heads(query_BHTE, key_BKTE, value_BKTE)
    scores_BHTT = query_BHTE @ key_BHTE.transpose(2, 3) * 1.0
    if options.get("softcap") is not None:
        scores_BHTT = (scores_BHTT / options["softcap"]).tanh() * options["softcap"]
    weights_BHTT = scores_BHTT.softmax(-1, dtype=torch.float32).to(query_BHTE.dtype)
    weights_BHTT = nn.functional.dropout(weights_BHTT, options.get("dropout", 0.0), module.training)
    return (weights_BHTT @ value_BHTE).transpose(1, 2).contiguous(), None


def _masked(
    module: Any, query_BHTE: Tensor, key_BKTE: Tensor, value_BKTE: Tensor, *_: Any, **__: Any
) -> tuple[Tensor, None]:
    """The sdpa backend with the mask of packed documents: with a mask it has no kernel for fewer
    key-value heads than heads, so keys and values are repeated.
    """
    del module
    key_BHTE, value_BHTE = _for_all_heads(query_BHTE, key_BKTE, value_BKTE)
    return _kept(query_BHTE, key_BHTE, value_BHTE, keeps_mask=True), None


def _fused(
    module: Any, query_BHTE: Tensor, key_BKTE: Tensor, value_BKTE: Tensor, *_: Any, **__: Any
) -> tuple[Tensor, None]:
    """A backend that recognises documents by their positions and so needs no mask."""
    del module
    return _kept(query_BHTE, key_BKTE, value_BKTE, keeps_mask=False), None


def _for_all_heads(
    query_BHTE: Tensor, key_BKTE: Tensor, value_BKTE: Tensor
) -> tuple[Tensor, Tensor]:
    num_repeats = query_BHTE.shape[1] // key_BKTE.shape[1]
    return repeat_kv(key_BKTE, num_repeats), repeat_kv(value_BKTE, num_repeats)


def _kept(query_BHTE: Tensor, key: Tensor, value: Tensor, *, keeps_mask: bool) -> Tensor:
    apply: Any = _Attention.apply  # has no types
    out: Tensor = apply(query_BHTE, key, value, keeps_mask)
    return out


class _Attention(torch.autograd.Function):
    """Keeps queries, keys, values, output and log-sum-exp, as memory-efficient kernels do (Dao et
    al., "FlashAttention", 2022), and the mask of sdpa.
    """

    @staticmethod
    def forward(
        ctx: Any, query_BHTE: Tensor, key_BKTE: Tensor, value_BKTE: Tensor, keeps_mask: bool
    ) -> Tensor:
        num_rows, num_heads, num_positions, _ = query_BHTE.shape
        out_BTHE = query_BHTE.new_empty(num_rows, num_positions, num_heads, value_BKTE.shape[-1])
        lse_BHT = query_BHTE.new_empty(num_rows, num_heads, num_positions, dtype=torch.float32)
        mask = lse_BHT
        if keeps_mask:
            mask = query_BHTE.new_empty(num_rows, num_positions, num_positions)
        ctx.save_for_backward(query_BHTE, key_BKTE, value_BKTE, out_BTHE, lse_BHT, mask)
        return out_BTHE

    @staticmethod
    def backward(*_: Any) -> Any:
        raise AssertionError("a plan has no backward")
