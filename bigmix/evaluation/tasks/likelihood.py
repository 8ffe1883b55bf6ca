"""The log-likelihood of each label as the answer to its prompt.

The prompt is read once; its keys and values are then repeated for all labels. Letters: B questions,
L labels of one, R = B * L rows, T tokens, V vocabulary.
"""

import inspect
from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import DynamicCache

from bigmix.evaluation.tasks.inference_model import InferenceModel, padded
from bigmix.evaluation.tasks.prompts import Question


def log_likelihoods(model: InferenceModel, questions: Sequence[Question]) -> list[list[float]]:
    """For each question the log-likelihood of each of its labels, in nats; all questions have the
    same number of labels.

    Where the model runs in step with other ranks, a collective of two forwards, whatever the
    questions.
    """
    device, num_labels = model.device, len(questions[0].labels)
    # The last token of the prompt goes with the labels: it predicts the first token of each.
    prompts = [question.prompt[:-1] for question in questions]
    width = max(1, *map(len, prompts))
    ids_BT, mask_BT = padded(prompts, width, device, at_left=True)
    rows = [q.prompt[-1:] + label for q in questions for label in q.labels]
    label_width = max(map(len, rows)) - 1
    inputs_RT, own_RT = padded([ids[:-1] for ids in rows], label_width, device, at_left=False)
    labels_RT, _ = padded([ids[1:] for ids in rows], label_width, device, at_left=False)
    logits_RTV = _logits(model, ids_BT, mask_BT, inputs_RT, own_RT)
    nll_RT = torch.nn.functional.cross_entropy(
        logits_RTV.float().transpose(1, 2), labels_RT, reduction="none"
    )
    sums_R: list[float] = (-nll_RT.double() * own_RT).sum(dim=1).tolist()
    return [sums_R[at : at + num_labels] for at in range(0, len(sums_R), num_labels)]


def _logits(
    model: InferenceModel, ids_BT: Tensor, mask_BT: Tensor, inputs_RT: Tensor, own_RT: Tensor
) -> Tensor:
    """Logits [R, T, V] of rows that follow prompts; a prompt is read once for all of its rows."""
    num_labels, width = len(inputs_RT) // len(ids_BT), ids_BT.shape[1]
    mask_RT = torch.cat([mask_BT.repeat_interleave(num_labels, dim=0), own_RT], dim=1)
    positions_RT = (mask_RT.cumsum(dim=1) - 1).clamp(min=0)
    cache = DynamicCache(config=model.lm.config)
    known = inspect.signature(model.lm.forward).parameters
    # The name of the argument since transformers 5.24, and before.
    cached = {"cache" if "cache" in known else "past_key_values": cache, "use_cache": True}
    # Models that have this argument do not compute the logits of the whole prompt.
    fewest = {"logits_to_keep": 1} if "logits_to_keep" in known else {}
    with torch.no_grad():
        model.lm(
            input_ids=ids_BT,
            attention_mask=mask_BT,
            position_ids=(mask_BT.cumsum(dim=1) - 1).clamp(min=0),
            **cached,
            **fewest,
        )
        cache.batch_repeat_interleave(num_labels)
        logits_RTV: Tensor = model.lm(
            input_ids=inputs_RT,
            attention_mask=mask_RT,
            position_ids=positions_RT[:, width:],
            **cached,
        ).logits
    return logits_RTV
