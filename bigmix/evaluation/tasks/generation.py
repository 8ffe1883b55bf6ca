"""Generates the outputs of prompts, greedily or each sampled with random numbers of its own.

Letters: R rows of a batch, T tokens, V vocabulary.
"""

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    StoppingCriteria,
    StoppingCriteriaList,
    TopPLogitsWarper,
)

from bigmix.evaluation.tasks.inference_model import InferenceModel, padded
from bigmix.evaluation.tasks.prompts import PromptTokens
from bigmix.seeding import keys_of
from bigmix.text.tokenizer import Tokenizer

_MANTISSA = 53  # bits of a double


@dataclass(frozen=True, kw_only=True, slots=True)
class GenerationSettings:
    """How outputs are generated: until one of the ids `stops` or one of the texts `stop_texts`, and
    at most `max_new_tokens` tokens.

    temperature 0: always the likeliest token; above: drawn, of the likeliest tokens that together
    have the probability `top_p`.
    """

    stops: frozenset[int]
    max_new_tokens: int
    temperature: float = 0.0
    top_p: float = 1.0
    stop_texts: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True, slots=True)
class Prompt:
    """The tokens of a prompt, and the key of the random numbers that its output is sampled with."""

    tokens: PromptTokens
    key: int = 0


@dataclass(frozen=True, kw_only=True, slots=True)
class GeneratedOutput:
    """What a model has written after a prompt: its tokens, and its text without what ends it.

    `is_ended`: whether the last of the tokens is one that ends an output; where not, the output was
    cut after as many tokens as are allowed.
    """

    tokens: PromptTokens
    text: str
    is_ended: bool


def generate(
    model: InferenceModel,
    tokenizer: Tokenizer,
    settings: GenerationSettings,
    prompts: Sequence[Prompt],
) -> list[GeneratedOutput]:
    """What the model writes after each prompt.

    Where the model runs in step with other ranks, a collective. An output depends only on its
    prompt and key, up to rounding, which may differ between batches of different shapes.
    """
    width = max(len(prompt.tokens) for prompt in prompts)
    tokens = [prompt.tokens for prompt in prompts]
    ids_RT, mask_RT = padded(tokens, width, model.device, at_left=True)
    config = GenerationConfig(
        max_new_tokens=settings.max_new_tokens,
        do_sample=False,
        use_cache=True,
        eos_token_id=sorted(settings.stops),
        pad_token_id=min(settings.stops),
    )
    with _own_settings(model.lm, config), torch.no_grad():
        written_RT = model.lm.generate(
            input_ids=ids_RT,
            attention_mask=mask_RT,
            generation_config=config,
            logits_processor=LogitsProcessorList(_drawing(settings, prompts, width, model.device)),
            stopping_criteria=StoppingCriteriaList(_stopping(tokenizer, settings, width)),
            synced_gpus=model.in_step,
        )
    return [
        _output(tokenizer, settings, prompt.tokens, written)
        for prompt, written in zip(prompts, written_RT[:, width:].tolist(), strict=True)
    ]


@contextmanager
def _own_settings(lm: Any, config: GenerationConfig) -> Iterator[None]:
    """A context in which only `config` decides how the model generates, and not the settings of its
    folder, such as a penalty or a temperature.
    """
    kept = lm.generation_config
    lm.generation_config = copy.deepcopy(config)
    try:
        yield
    finally:
        lm.generation_config = kept


def _drawing(
    settings: GenerationSettings, prompts: Sequence[Prompt], width: int, device: torch.device
) -> Iterator[LogitsProcessor]:
    if settings.temperature:
        uniforms_RT = np.stack([_uniforms(each.key, settings.max_new_tokens) for each in prompts])
        yield TokenSampler(
            torch.from_numpy(uniforms_RT).to(device), width, partial(_probabilities, settings)
        )


def _uniforms(key: int, count: int) -> npt.NDArray[np.float64]:
    """Random numbers in [0, 1) as a function of the key."""
    words = keys_of(key, np.arange(count)) >> np.uint64(64 - _MANTISSA)
    uniforms: npt.NDArray[np.float64] = words.astype(np.float64) / 2**_MANTISSA
    return uniforms


def _probabilities(settings: GenerationSettings, scores_RV: Tensor) -> Tensor:
    """The probabilities [R, V] of the next tokens at a temperature and top_p."""
    scores_RV = scores_RV / settings.temperature
    if settings.top_p < 1:
        scores_RV = TopPLogitsWarper(settings.top_p)(None, scores_RV)
    return scores_RV.double().softmax(dim=-1)


class TokenSampler(LogitsProcessor):  # type: ignore[misc]
    """Draws the next token of each row and bars all others, so that greedy search takes it.

    Token t after a prompt of `prompt_width` tokens is drawn with the number uniforms_RT[row, t]
    from [0, 1). torch.multinomial draws for all rows together: the token of a row would depend on
    the other rows. `probabilities` turns logits [R, V] into weights in fp64, which need not sum to
    1.
    """

    def __init__(
        self,
        uniforms_RT: Tensor,
        prompt_width: int,
        probabilities: Callable[[Tensor], Tensor],
    ) -> None:
        self._uniforms_RT = uniforms_RT
        self._prompt_width = prompt_width
        self._probabilities = probabilities

    def __call__(self, ids_RT: Tensor, scores_RV: Tensor) -> Tensor:
        uniforms_R = self._uniforms_RT[:, ids_RT.shape[1] - self._prompt_width]
        drawn_R = draw_ids(self._probabilities(scores_RV), uniforms_R)
        return torch.full_like(scores_RV, -torch.inf).scatter(1, drawn_R[:, None], 0.0)


def draw_ids(weights_RV: Tensor, uniforms_R: Tensor) -> Tensor:
    """The id [R] that each row's number u falls on when the weights are laid end to end.

    That is the first id v with w_0 + ... + w_v > u (w_0 + ... + w_V-1): 0.3 falls on id 1 of the
    weights 0.1, 0.4 and 0.5. Where rounding lifts the product to the sum, it is the last id of
    positive weight.
    """
    sums_RV = weights_RV.cumsum(dim=-1)
    reached_R1 = uniforms_R[:, None] * sums_RV[:, -1:]
    drawn_R = torch.searchsorted(sums_RV, reached_R1, right=True)[:, 0]
    ids_V = torch.arange(weights_RV.shape[1], device=weights_RV.device)
    last_R = torch.where(weights_RV > 0, ids_V, 0).amax(dim=-1)
    return torch.minimum(drawn_R, last_R)


def _stopping(
    tokenizer: Tokenizer, settings: GenerationSettings, width: int
) -> Iterator[StoppingCriteria]:
    if settings.stop_texts:
        yield _Stopped(tokenizer, settings.stop_texts, width)


class _Stopped(StoppingCriteria):  # type: ignore[misc]
    """Ends a row once one of the texts is in its output.

    transformers' StopStringCriteria would end some rows too early, since it includes the prompt: a
    line break of the model after a prompt that ends in one would be a stop at two line breaks. It
    also decodes the whole vocabulary for each set of texts, which takes seconds for a large one.
    """

    def __init__(self, tokenizer: Tokenizer, stop: Sequence[str], width: int) -> None:
        self._tokenizer = tokenizer
        self._stop = stop
        # A token is at least one byte, except for a few that are none.
        self._tail = 8 + max(len(text.encode()) for text in stop)
        self._width = width

    def __call__(self, ids_RT: Tensor, scores: Any, **kwargs: Any) -> Tensor:  # noqa: ARG002
        tails = ids_RT[:, self._width :][:, -self._tail :].tolist()
        texts = [self._tokenizer.decode(tail) for tail in tails]
        found = [any(stop in text for stop in self._stop) for text in texts]
        return torch.tensor(found, device=ids_RT.device)


def _output(
    tokenizer: Tokenizer,
    settings: GenerationSettings,
    prompt: PromptTokens,
    written: Sequence[int],
) -> GeneratedOutput:
    end = next((at for at, token in enumerate(written) if token in settings.stops), None)
    own = [token for token in written[:end] if token not in tokenizer.special_ids]
    # Some tokenizers drop the space before the first word of a text; after the prompt it is kept.
    before = tokenizer.decode(prompt)
    text = tokenizer.decode([*prompt, *own]).removeprefix(before)
    cuts = [at for stop in settings.stop_texts if (at := text.find(stop)) >= 0]
    return GeneratedOutput(
        tokens=tuple(written if end is None else written[: end + 1]),
        text=text[: min(cuts, default=len(text))],
        is_ended=end is not None,
    )
