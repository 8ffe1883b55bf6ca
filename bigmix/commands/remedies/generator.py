"""Generates many texts at once: a row of the batch that has ended is given the next prompt.

Letters: R rows, T tokens, V vocabulary, K ids that may be kept.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from torch import Tensor

from bigmix.commands.remedies.row_cache import (
    BatchRows,
    GenerationRequest,
    NextRequest,
    RowLogits,
    can_exchange_rows,
)
from bigmix.errors import BigmixError
from bigmix.evaluation.tasks.generation import draw_ids
from bigmix.evaluation.tasks.inference_model import padded
from bigmix.text.tokenizer import Tokenizer

_ROWS_ON_CPU, _MOST_ROWS_ON_GPU = 64, 256


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Completion:
    """The ids that follow a prompt, without the one that ended them; `is_cut` where none did."""

    request: GenerationRequest
    ids: Sequence[int]
    is_cut: bool


class TextGenerator:
    """A model in memory that texts are generated from, `num_rows` at a time.

    `ends` are the ids that end a text, and ids in `barred_V` are never generated. What is generated
    depends on the request alone, up to rounding, which may differ between batches.
    """

    def __init__(
        self, lm: Any, *, ends: Sequence[int], barred_V: Tensor, top_p: float, num_rows: int
    ) -> None:
        self._lm = lm
        self._ends = frozenset(ends)
        self._barred_V = barred_V.to(lm.device)
        self._top_p = top_p
        self._num_rows = num_rows

    def completions(self, next_request: NextRequest) -> Iterator[Completion]:
        """What follows the requests, in the order in which it ends, until there is no request and
        no row is left; raises BigmixError where the memory of a GPU is not enough.
        """
        run = self._refilled if can_exchange_rows(self._lm) else self._in_batches
        try:
            yield from run(next_request)
        except torch.OutOfMemoryError as error:
            raise BigmixError(
                f"--batch {self._num_rows} needs more memory than the GPU has; give a smaller one,"
                " the command goes on where it was"
            ) from error

    def _refilled(self, next_request: NextRequest) -> Iterator[Completion]:
        rows = BatchRows(self._lm, self._num_rows)
        while True:
            found = rows.take(next_request)
            if found:
                yield from self._chosen(rows, rows.read(found))
            elif rows.active:
                rows.shrink()
                yield from self._chosen(rows, rows.step())
            elif rows.is_new:
                return
            else:
                rows = BatchRows(self._lm, self._num_rows)

    def _chosen(self, rows: BatchRows, logits: RowLogits) -> Iterator[Completion]:
        """Append a token to each of these rows; yields the texts that end."""
        texts = [rows.active[row] for row in logits.rows]
        tokens = self._draw(logits.logits_RV, [(each.request, len(each.ids)) for each in texts])
        for row, text, token in zip(logits.rows, texts, tokens, strict=True):
            if token not in self._ends:
                text.ids.append(token)
            is_full = len(text.ids) == len(text.request.uniforms_T)
            if token in self._ends or is_full:
                del rows.active[row]
                is_cut = token not in self._ends
                yield Completion(request=text.request, ids=text.ids, is_cut=is_cut)
            else:
                rows.last_ids[row] = token

    def _draw(
        self, logits_RV: Tensor, places: Sequence[tuple[GenerationRequest, int]]
    ) -> list[int]:
        """The next token of each request, of which the number of tokens so far is given."""
        temperatures_R = torch.tensor(
            [request.temperature for request, _ in places], dtype=torch.float64
        ).to(logits_RV.device)
        uniforms_R = torch.tensor(
            [float(request.uniforms_T[at]) for request, at in places], dtype=torch.float64
        ).to(logits_RV.device)
        drawn_R = next_ids(logits_RV, self._barred_V, temperatures_R, self._top_p, uniforms_R)
        tokens: list[int] = drawn_R.tolist()
        return tokens

    def _in_batches(self, next_request: NextRequest) -> Iterator[Completion]:
        """The same with transformers' own loop, for models whose cache has other parts than keys
        and values: one batch after another, each until its last text has ended.
        """
        while True:
            requests: list[GenerationRequest] = []
            while len(requests) < self._num_rows and (request := next_request()) is not None:
                requests.append(request)
            if not requests:
                return
            for request, ids in zip(requests, self._generated(requests), strict=True):
                own = ids[: len(request.uniforms_T)]
                end = next((at for at, token in enumerate(own) if token in self._ends), None)
                yield Completion(request=request, ids=own[:end], is_cut=end is None)

    def _generated(self, requests: Sequence[GenerationRequest]) -> list[list[int]]:
        """The ids after each prompt, with what follows an end."""
        width = max(len(request.prompt) for request in requests)

        def choose(ids_RT: Tensor, scores_RV: Tensor) -> Tensor:
            at = ids_RT.shape[1] - width
            # Texts that are as long as they may be go on until all are, and what is chosen is cut.
            places = [(request, min(at, len(request.uniforms_T) - 1)) for request in requests]
            drawn_R1 = torch.tensor(self._draw(scores_RV, places), device=scores_RV.device)[:, None]
            return torch.full_like(scores_RV, -torch.inf).scatter(1, drawn_R1, 0.0)

        prompts = [request.prompt for request in requests]
        ids_RT, mask_RT = padded(prompts, width, self._lm.device, at_left=True)
        # The configuration of the model may have penalties and truncations, with which the texts
        # would not be what it has learned.
        self._lm.generation_config = transformers.GenerationConfig(
            max_new_tokens=max(len(request.uniforms_T) for request in requests),
            do_sample=False,
            eos_token_id=sorted(self._ends),
            pad_token_id=min(self._ends),
        )
        written_RT = self._lm.generate(
            ids_RT,
            attention_mask=mask_RT,
            logits_processor=transformers.LogitsProcessorList([choose]),
        )
        tokens: list[list[int]] = written_RT[:, width:].tolist()
        return tokens


def faults_of_top_p(top_p: float) -> Iterator[str]:
    """What is wrong with a `top_p` that the user gives."""
    if not 0 < top_p <= 1:
        yield f"--top-p is {top_p:g}, must be above 0 and at most 1; 1 leaves nothing out"


def usual_rows(lm: Any, num_tokens: int) -> int:
    """The number of rows to generate at a time where the user gives none, if each may have so many
    tokens: 64 on a CPU, on a GPU as many as half of its free memory holds, at most 256.
    """
    if lm.device.type != "cuda":
        return _ROWS_ON_CPU
    free_bytes, _ = torch.cuda.mem_get_info(lm.device)
    return rows_in(lm.config, num_tokens, free_bytes // 2)


def rows_in(config: Any, num_tokens: int, num_bytes: int) -> int:
    """How many rows have their keys and values, in 2 bytes each, in this memory: from 1 to 256."""
    own = config.get_text_config(decoder=True)
    num_heads = getattr(own, "num_attention_heads", None)
    if not isinstance(num_heads, int):  # none, or layers that differ
        return _ROWS_ON_CPU
    head_size = getattr(own, "head_dim", None) or own.hidden_size // num_heads
    num_cached = getattr(own, "num_key_value_heads", None) or num_heads
    row_bytes = 2 * 2 * own.num_hidden_layers * num_cached * head_size * num_tokens
    return max(1, min(_MOST_ROWS_ON_GPU, int(num_bytes // row_bytes)))


def ends_of(lm: Any, tokenizer: Tokenizer) -> list[int]:
    """The ids that end a text for the tokenizer or for the model."""
    named = getattr(lm.generation_config, "eos_token_id", None)
    own = named if isinstance(named, list) else [named]
    return sorted({tokenizer.eos_id, *(token for token in own if token is not None)})


def barred_ids(tokenizer: Tokenizer, ends: Sequence[int], vocab_size: int) -> Tensor:
    """True for ids [V] that are never generated: special tokens other than the ends, and rows of
    the head without a token.
    """
    barred_V = torch.zeros(vocab_size, dtype=torch.bool)
    barred_V[tokenizer.vocab_size :] = True
    barred_V[[token for token in tokenizer.special_ids if token < vocab_size]] = True
    barred_V[list(ends)] = False
    return barred_V


def next_ids(
    logits_RV: Tensor, barred_V: Tensor, temperatures_R: Tensor, top_p: float, uniforms_R: Tensor
) -> Tensor:
    """The next id [R] of each row: the likeliest at temperature 0, else the one that its number u
    falls on.
    """
    logits_RV = logits_RV.masked_fill(barred_V, -torch.inf)
    is_greedy_R = temperatures_R == 0
    likeliest_R = logits_RV.argmax(dim=1)
    if is_greedy_R.all():
        return likeliest_R
    heats_R = torch.where(is_greedy_R, 1.0, temperatures_R)
    drawn_R = draw_ids(probabilities(logits_RV, heats_R, top_p), uniforms_R)
    return torch.where(is_greedy_R, likeliest_R, drawn_R)


def probabilities(logits_RV: Tensor, temperatures_R: Tensor, top_p: float) -> Tensor:
    """The probabilities [R, V] of the next ids at the temperature of each row, 0 for those that
    `top_p` leaves out; the others need not sum to 1.
    """
    probabilities_RV = (logits_RV.double() / temperatures_R[:, None]).softmax(dim=1)
    return probabilities_RV if top_p == 1 else _truncated(probabilities_RV, top_p)


def _truncated(probabilities_RV: Tensor, top_p: float) -> Tensor:
    """The probabilities with 0 for the least probable tokens, as long as the others sum to `top_p`
    (Holtzman et al., 2020).

    Of equally probable tokens, which are common among logits in bf16, the first are kept. Which of
    them transformers' TopPLogitsWarper keeps is not defined.
    """
    # Tokens below this probability do not have 1 - top_p together, so none of them is kept; to sort
    # the few others is several times faster than to sort the vocabulary.
    num_ids = probabilities_RV.shape[1]
    may_stay_RV = probabilities_RV >= (1 - top_p) / num_ids
    counts_R = may_stay_RV.sum(dim=1)
    rows, ids = may_stay_RV.nonzero(as_tuple=True)
    places = torch.arange(len(rows), device=rows.device) - (counts_R.cumsum(0) - counts_R)[rows]
    few_RK = probabilities_RV.new_zeros(len(probabilities_RV), int(counts_R.max()))
    ids_RK = torch.zeros_like(few_RK, dtype=torch.long)
    few_RK[rows, places], ids_RK[rows, places] = probabilities_RV[rows, ids], ids
    sorted_RK, order_RK = few_RK.sort(dim=1, descending=True, stable=True)
    before_RK = sorted_RK.cumsum(dim=1) - sorted_RK
    kept_RK = torch.where(before_RK < top_p, sorted_RK, 0.0)
    # Places without a token are 0 and would all be written to id 0: they are added, not written.
    truncated_RV = torch.zeros_like(probabilities_RV)
    return truncated_RV.scatter_add(1, ids_RK.gather(1, order_RK), kept_RK)
