"""Scores the tokens of given answers, each after the true tokens before it.

Letters: R rows of a batch, T tokens of one, A tokens of its answer, K ids in the place of each
token, V vocabulary.
"""

import inspect
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from bigmix.evaluation.behaviour.answers import Respondent, over_batches
from bigmix.evaluation.behaviour.records import Answer, AnswerScores, ChatPrompts, Tokens
from bigmix.evaluation.tasks.inference_model import InferenceModel, padded
from bigmix.types import Floats, Ints

NUM_LIKELIEST = 64
_LOGIT_BYTES = 256 << 20  # of the logits of one forward, unless those of one answer are more
_CHUNK_BYTES = 64 << 20  # of them in fp32 at a time


@dataclass(frozen=True, kw_only=True, slots=True)
class _Row:
    """A prompt and an answer, the number of the answer, and the ids that are looked at in the place
    of each of its tokens; None: the likeliest.
    """

    index: int
    prompt: Tokens
    answer: Tokens
    ids_AK: Ints | None


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class _Scored:
    """The scores of one answer, as `AnswerScores` has them of all."""

    index: int
    nll_A: Floats
    ids_AK: Ints
    log_probs_AK1: Floats


def score_given(
    respondent: Respondent,
    chat: ChatPrompts,
    answers: Sequence[Answer],
    ids_NK: Ints | None = None,
) -> AnswerScores | None:
    """How likely the model finds these answers to the prompts; a collective, with the same result
    on all ranks.

    The log-probabilities are those of `ids_NK` in the place of each token; None: of the likeliest.
    None where a stop was requested on any rank.
    """
    ends = np.cumsum([len(answer.tokens) for answer in answers])
    own = [None] * len(answers) if ids_NK is None else np.split(ids_NK, ends[:-1])
    rows = [
        _Row(index=index, prompt=prompt, answer=answer.tokens, ids_AK=ids_AK)
        for index, (prompt, answer, ids_AK) in enumerate(
            zip(chat.tokens, answers, own, strict=True)
        )
    ]
    # Rows of similar lengths together: the shorter ones are padded.
    rows.sort(key=lambda row: (-len(row.prompt) - len(row.answer), row.index))
    model = respondent.model
    found = over_batches(
        respondent,
        rows,
        _num_rows(model, rows),
        "loss of the base's answers",
        lambda part: _scored(model, part),
    )
    if found is None:
        return None
    found.sort(key=lambda each: each.index)
    return AnswerScores(
        nll_N=np.concatenate([each.nll_A for each in found]),
        ids_NK=np.concatenate([each.ids_AK for each in found]),
        log_probs_NK1=np.concatenate([each.log_probs_AK1 for each in found]),
    )


def _num_rows(model: InferenceModel, rows: Sequence[_Row]) -> int:
    """Rows of a forward whose logits fit into memory."""
    longest = max(len(row.answer) for row in rows)
    if not _keeps_logits(model):
        longest = max(len(row.prompt) + len(row.answer) for row in rows)
    row_bytes = int(longest * model.lm.config.vocab_size * model.lm.dtype.itemsize)
    return max(1, _LOGIT_BYTES // row_bytes)


def _keeps_logits(model: InferenceModel) -> bool:
    """Whether the model can leave out the logits of positions before the answer."""
    return "logits_to_keep" in inspect.signature(model.lm.forward).parameters


def _scored(model: InferenceModel, rows: Sequence[_Row]) -> Iterator[_Scored]:
    logits_RAV = _logits(model, rows)
    for row, logits_AV in zip(rows, logits_RAV, strict=True):
        yield _scores(row, logits_AV[-len(row.answer) :])


def _logits(model: InferenceModel, rows: Sequence[_Row]) -> Tensor:
    """The logits that predict the tokens of each answer, the last ones of its row [R, A, V]."""
    longest = max(len(row.answer) for row in rows)
    shown = [[*row.prompt, *row.answer[:-1]] for row in rows]
    ids_RT, mask_RT = padded(shown, max(map(len, shown)), model.device, at_left=True)
    fewest = {"logits_to_keep": longest} if _keeps_logits(model) else {}
    with torch.no_grad():
        logits_RAV: Tensor = model.lm(
            input_ids=ids_RT,
            attention_mask=mask_RT,
            position_ids=(mask_RT.cumsum(dim=1) - 1).clamp(min=0),
            use_cache=False,
            **fewest,
        ).logits
    return logits_RAV


def _scores(row: _Row, logits_AV: Tensor) -> _Scored:
    """The scores of an answer from the logits that predict its tokens, a part of them at a time."""
    num_tokens, vocab_size = logits_AV.shape
    size = max(1, _CHUNK_BYTES // (4 * vocab_size))
    labels_A1 = torch.tensor(row.answer, device=logits_AV.device)[:, None]
    given_AK = None if row.ids_AK is None else torch.from_numpy(row.ids_AK).to(logits_AV.device)
    nlls, ids, log_probs = [], [], []
    for begin in range(0, num_tokens, size):
        part = slice(begin, begin + size)
        logs_AV = logits_AV[part].float().log_softmax(dim=1)
        if given_AK is None:
            ids_AK = logs_AV.topk(min(NUM_LIKELIEST, vocab_size), dim=1).indices
        else:
            ids_AK = given_AK[part].long()
        nlls.append(-logs_AV.gather(1, labels_A1[part])[:, 0])
        own_AK = logs_AV.gather(1, ids_AK)
        # Summed, and not one minus the others, which would leave few digits.
        rest_A1 = logs_AV.scatter_(1, ids_AK, -torch.inf).logsumexp(dim=1, keepdim=True)
        ids.append(ids_AK.int())
        log_probs.append(torch.cat([own_AK, rest_A1], dim=1))
    return _Scored(
        index=row.index,
        nll_A=torch.cat(nlls).cpu().numpy(),
        ids_AK=torch.cat(ids).cpu().numpy(),
        log_probs_AK1=torch.cat(log_probs).cpu().numpy(),
    )
