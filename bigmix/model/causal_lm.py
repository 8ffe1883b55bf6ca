"""Builds causal language models whose head computes the mixed loss.

Letters: B rows, T tokens of one, D width of the hidden states, V vocabulary, G groups, K loss
tokens with a divergence from the reference.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers.utils import is_flash_attn_2_available
from transformers.utils.logging import disable_progress_bar

from bigmix.errors import BadInput
from bigmix.loss.head import HeadSettings, make_mixed
from bigmix.loss.requests import LossBackendOptions
from bigmix.loss.terms import LogitRule, LossTerms, LossTokens, ReferenceStates
from bigmix.types import Choice

_POSITION_KEYS = ("max_position_embeddings", "n_positions", "max_seq_len")
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelTensors:
    """A micro-batch on the device of the model."""

    ids_BT: Tensor
    positions_BT: Tensor
    tokens: LossTokens
    reference: "ReferenceTensors | None" = None


@dataclass(frozen=True, kw_only=True, slots=True)
class ReferenceTensors:
    """What the reference gives for the first K loss tokens: its final hidden states and its head.

    Inside the context of `head()` the head's weights are whole; under ZeRO-3 they are gathered for
    that time only.
    """

    hidden_KD: Tensor
    coefficients_K: Tensor
    rule: LogitRule
    head: "Callable[[], AbstractContextManager[nn.Linear]]"


class MixedLM(nn.Module):
    """A Hugging Face causal language model whose forward is the loss of a micro-batch."""

    def __init__(self, lm: Any, terms: LossTerms, options: LossBackendOptions) -> None:
        super().__init__()
        self.lm = lm
        head = linear_head(lm)
        rule = logit_rule(lm.config)
        make_mixed(head, HeadSettings(rule=rule, terms=terms, options=options))

    def forward(self, batch: ModelTensors) -> tuple[Tensor, Tensor]:
        """The objective of the micro-batch and the sums of each group [G, Statistic]."""
        hidden_BTD = self.hidden(batch.ids_BT, batch.positions_BT)
        reference = nullcontext() if batch.reference is None else _whole(batch.reference)
        # The reference's head is gathered after the body of the model, so that it is whole only
        # while the loss is computed.
        with reference as reference_states:
            loss: tuple[Tensor, Tensor] = self.lm.get_output_embeddings()(
                hidden_BTD.flatten(0, 1), batch.tokens, reference_states
            )
        return loss

    def hidden(self, ids_BT: Tensor, positions_BT: Tensor) -> Tensor:
        """Final hidden states [B, T, D]."""
        return final_hidden(self.lm, ids_BT, positions_BT)


class InferenceLM(nn.Module):
    """A Hugging Face causal language model whose forward returns final hidden states [B, T, D]."""

    def __init__(self, lm: Any) -> None:
        super().__init__()
        self.lm = lm.requires_grad_(False)
        linear_head(lm)
        self.rule = logit_rule(lm.config)

    @property
    def head(self) -> nn.Linear:
        """The model's own head; a property, since ZeRO-3 hooks a module as often as it is
        registered.
        """
        return linear_head(self.lm)

    def forward(self, ids_BT: Tensor, positions_BT: Tensor) -> Tensor:
        """Hidden states before the head."""
        return final_hidden(self.lm, ids_BT, positions_BT)


def final_hidden(lm: Any, ids_BT: Tensor, positions_BT: Tensor) -> Tensor:
    """Final hidden states [B, T, D]; a document begins wherever the positions restart.

    No attention mask is passed: with one, even of ones, the attention backends ignore the
    positions.
    """
    shape = ids_BT.shape
    if lm.config._attn_implementation == "flash_attention_2":
        # transformers derives documents from positions only where there is one row. Joining the
        # rows to one changes nothing, since every row begins a document.
        ids_BT, positions_BT = ids_BT.view(1, -1), positions_BT.view(1, -1)
    body = lm.base_model(input_ids=ids_BT, position_ids=positions_BT, use_cache=False)
    hidden_BTD: Tensor = body.last_hidden_state
    return hidden_BTD.view(*shape, -1)


def linear_head(lm: Any) -> nn.Linear:
    """The head of a language model; raises BadInput where it is not a linear layer."""
    head = lm.get_output_embeddings()
    if type(head) is not nn.Linear:
        raise BadInput(
            f"the head of {type(lm).__name__} is a {type(head).__name__}; bigmix trains models"
            " whose head is a linear layer, give another model"
        )
    return head


@contextmanager
def _whole(reference: ReferenceTensors) -> Iterator[ReferenceStates]:
    with reference.head() as head:
        yield ReferenceStates(
            hidden_KD=reference.hidden_KD,
            head_VD=head.weight,
            bias_V=head.bias,
            rule=reference.rule,
            coefficients_K=reference.coefficients_K,
        )


def logit_rule(config: Any) -> LogitRule:
    """How the architecture turns the head's output into logits: Gemma caps, Cohere multiplies and
    Granite divides it.
    """
    scale = getattr(config, "logit_scale", None) or 1.0
    divisor = getattr(config, "logits_scaling", None) or 1.0
    return LogitRule(
        scale=scale / divisor, softcap=getattr(config, "final_logit_softcapping", None)
    )


def read_config(
    path: str | None, config: Mapping[str, Any] | None, *, key: str = "model.path"
) -> Any:
    """The Hugging Face configuration of a model folder, a hub name or a table of settings.

    `key` is the setting or option of the path, for messages. Raises BadInput where there is no
    configuration, its model_type is unknown, or it is that of a model of several parts.
    """
    named = f"{key} {path}" if path is not None else "model.config"
    try:
        if path is not None:
            found = transformers.AutoConfig.from_pretrained(path)
        else:
            settings = dict(config or {})
            found = transformers.AutoConfig.for_model(settings.pop("model_type"), **settings)
    except (OSError, ValueError, KeyError, TypeError) as error:
        first = str(error).strip().splitlines()[0]
        raise BadInput(
            f"{named} gives no model configuration ({first}); give a folder with a config.json, a"
            " hub name, or a config with a model_type that transformers knows"
        ) from error
    if getattr(found, "vocab_size", None) is None:
        raise BadInput(
            f"{named} is a model of several parts ({found.model_type}), and its configuration has"
            " no vocab_size of its own; give its causal language model alone, saved by"
            " transformers from the text part"
        )
    return found


def max_positions(config: Any) -> int | None:
    """The longest row that the model has positions for; None where it sets no limit."""
    return next((n for k in _POSITION_KEYS if (n := getattr(config, k, None)) is not None), None)


def choose_dtype(dtype: str, device: torch.device) -> Choice:
    """The precision of weights and activations."""
    if dtype != "auto":
        return Choice(value=dtype, reason="as the recipe says")
    if device.type == "cpu":
        return Choice(value="fp32", reason="no GPU")
    return Choice(value="bf16", reason="a GPU is available")


def choose_attention(attention: str, config: Any, device: torch.device, dtype: str) -> Choice:
    """The attention backend; all of them keep packed documents apart."""
    if attention != "auto":
        return Choice(value=attention, reason="as the recipe says")
    if getattr(config, "attn_logit_softcapping", None) is not None:
        return Choice(
            value="eager", reason="the model caps its attention scores, which sdpa cannot do"
        )
    if device.type == "cuda" and dtype == "bf16" and is_flash_attn_2_available():
        return Choice(value="flash_attention_2", reason="flash-attn is installed")
    return Choice(value="sdpa", reason="part of torch, runs everywhere")


def build(
    config: Any,
    path: str | None,
    *,
    dtype: str,
    attention: str,
    activation_checkpointing: bool,
    terms: LossTerms,
    options: LossBackendOptions,
    seed: int,
    construction: AbstractContextManager[None],
) -> MixedLM:
    """The model to train: what `load` makes, with the mixed loss in its head.

    Raises BadInput where transformers refuses the combination of settings.
    """
    lm = load(config, path, dtype=dtype, attention=attention, seed=seed, construction=construction)
    if activation_checkpointing:
        lm.gradient_checkpointing_enable({"use_reentrant": False})
    return MixedLM(lm, terms, options)


def load(
    config: Any,
    path: str | None,
    *,
    dtype: str,
    attention: str,
    seed: int,
    construction: AbstractContextManager[None],
) -> Any:
    """A causal language model of transformers with its weights.

    Inside `construction` each parameter is sharded as soon as it exists. Without a path the weights
    are random, from `seed`. Raises BadInput where transformers refuses the combination of settings.
    """
    torch.manual_seed(seed)
    disable_progress_bar()  # its updates would fill one line of a log
    options = {"dtype": DTYPES[dtype], "attn_implementation": attention}
    try:
        with construction:
            if path is None:
                lm = transformers.AutoModelForCausalLM.from_config(config, **options)
            else:
                lm = transformers.AutoModelForCausalLM.from_pretrained(
                    path, config=config, **options
                )
    except (OSError, ValueError, ImportError) as error:
        first = str(error).strip().splitlines()[0]
        raise BadInput(
            f"the model {path or config.model_type} with attention {attention} and dtype {dtype}"
            f" cannot be built ({first}); check model.path, or set model.attention=sdpa or eager"
        ) from error
    lm.config.use_cache = False
    return lm
