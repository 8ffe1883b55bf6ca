"""Prompts go in, what a model writes behind them comes out, by transformers' own `generate`.

Letters: R rows of a batch, T tokens, V vocabulary.
"""

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
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
from bigmix.recipe.task import Task
from bigmix.seeding import keys_of
from bigmix.text.tokenizer import Tokenizer

_MANTISSA = 53  # bits of a double


@dataclass(frozen=True, kw_only=True, slots=True)
class Prompt:
    """The tokens of a prompt, and the key of the chance by which its output is drawn."""

    tokens: PromptTokens
    key: int


def generate(
    model: InferenceModel,
    tokenizer: Tokenizer,
    task: Task,
    stops: frozenset[int],
    prompts: Sequence[Prompt],
) -> list[str]:
    """What the model writes behind each prompt, without what ends it.

    Where the speaker is in step with other ranks, a collective. An output depends on its own prompt
    and key alone, up to the rounding of other sums in a batch of other shapes.
    """
    width = max(len(prompt.tokens) for prompt in prompts)
    tokens = [prompt.tokens for prompt in prompts]
    ids_RT, mask_RT = padded(tokens, width, model.device, at_left=True)
    config = GenerationConfig(
        max_new_tokens=task.max_new_tokens,
        do_sample=False,
        use_cache=True,
        eos_token_id=sorted(stops),
        pad_token_id=min(stops),
    )
    with _own_settings(model.lm, config), torch.no_grad():
        written_RT = model.lm.generate(
            input_ids=ids_RT,
            attention_mask=mask_RT,
            generation_config=config,
            logits_processor=LogitsProcessorList(_drawing(task, prompts, width, model.device)),
            stopping_criteria=StoppingCriteriaList(_stopping(tokenizer, task, width)),
            synced_gpus=model.in_step,
        )
    return [
        _text(tokenizer, task, stops, prompt.tokens, written)
        for prompt, written in zip(prompts, written_RT[:, width:].tolist(), strict=True)
    ]


@contextmanager
def _own_settings(lm: Any, config: GenerationConfig) -> Iterator[None]:
    """Inside, what the model's folder says of generation (a penalty, a temperature) does not join
    what is asked for.
    """
    kept = lm.generation_config
    lm.generation_config = copy.deepcopy(config)
    try:
        yield
    finally:
        lm.generation_config = kept


def _drawing(
    task: Task, prompts: Sequence[Prompt], width: int, device: torch.device
) -> Iterator[LogitsProcessor]:
    if task.temperature:
        chances_RT = np.stack([_chances(prompt.key, task.max_new_tokens) for prompt in prompts])
        yield _Drawn(task, torch.from_numpy(chances_RT).to(device), width)


def _chances(key: int, count: int) -> npt.NDArray[np.float64]:
    """Numbers in [0, 1) that follow from a key."""
    words = keys_of(key, np.arange(count)) >> np.uint64(64 - _MANTISSA)
    chances: npt.NDArray[np.float64] = words.astype(np.float64) / 2**_MANTISSA
    return chances


class _Drawn(LogitsProcessor):  # type: ignore[misc]
    """Leaves of each row's tokens the one that its own chance falls on, so that greedy search takes
    it.

    torch.multinomial draws for all rows together: what a row gets would depend on its neighbours.
    """

    def __init__(self, task: Task, chances_RT: Tensor, width: int) -> None:
        self._temperature = task.temperature
        self._top_p = TopPLogitsWarper(task.top_p) if task.top_p < 1 else None
        self._chances_RT = chances_RT
        self._width = width

    def __call__(self, ids_RT: Tensor, scores_RV: Tensor) -> Tensor:
        scores_RV = scores_RV / self._temperature
        if self._top_p is not None:
            scores_RV = self._top_p(ids_RT, scores_RV)
        sums_RV = scores_RV.double().softmax(dim=-1).cumsum(dim=-1)
        chance_R1 = self._chances_RT[:, ids_RT.shape[1] - self._width, None] * sums_RV[:, -1:]
        drawn_R1 = torch.searchsorted(sums_RV, chance_R1, right=True)
        drawn_R1 = drawn_R1.clamp(
            max=sums_RV.shape[1] - 1
        )  # a product may be rounded up to the sum
        return torch.full_like(scores_RV, -torch.inf).scatter(1, drawn_R1, 0.0)


def _stopping(tokenizer: Tokenizer, task: Task, width: int) -> Iterator[StoppingCriteria]:
    if task.stop:
        yield _Stopped(tokenizer, task.stop, width)


class _Stopped(StoppingCriteria):  # type: ignore[misc]
    """Ends a row once one of the texts is in it."""

    def __init__(self, tokenizer: Tokenizer, stop: Sequence[str], width: int) -> None:
        self._tokenizer = tokenizer
        self._stop = stop
        # A token is a byte or more, but for a few that are none.
        self._tail = 8 + max(len(text.encode()) for text in stop)
        self._width = width

    def __call__(self, ids_RT: Tensor, scores: Any, **kwargs: Any) -> Tensor:  # noqa: ARG002
        tails = ids_RT[:, self._width :][:, -self._tail :].tolist()
        texts = [self._tokenizer.decode(tail) for tail in tails]
        found = [any(stop in text for stop in self._stop) for text in texts]
        return torch.tensor(found, device=ids_RT.device)


def _text(
    tokenizer: Tokenizer,
    task: Task,
    stops: frozenset[int],
    prompt: PromptTokens,
    written: Sequence[int],
) -> str:
    end = next((at for at, token in enumerate(written) if token in stops), len(written))
    own = [token for token in written[:end] if token not in tokenizer.special_ids]
    # Some tokenizers take the space before the first word of a text away: behind the prompt it
    # stays.
    before = tokenizer.decode(prompt)
    text = tokenizer.decode([*prompt, *own]).removeprefix(before)
    cuts = [at for stop in task.stop if (at := text.find(stop)) >= 0]
    return text[: min(cuts, default=len(text))]
