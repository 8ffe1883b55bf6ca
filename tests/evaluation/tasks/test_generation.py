"""Tokens are drawn where their own number falls, and an output ends at a stop text of its own."""

import math

import pytest
import torch
import transformers

from bigmix.evaluation.tasks.generation import TokenSampler, _Stopped, draw_ids
from bigmix.text.tokenizer import load_tokenizer

TINY = 5e-324  # the smallest double: nine tenths of it are rounded up to it


def slow_draw(weights, uniform):
    """Walk along the weights until their sum is above this part of all of them."""
    reached, height, last = uniform * sum(weights), 0.0, 0
    for index, weight in enumerate(weights):
        height += weight
        if height > reached:
            return index
        last = index if weight > 0 else last
    return last


def test_the_draw_is_that_of_a_walk_along_the_weights():
    torch.manual_seed(0)
    weights = torch.rand(500, 40, dtype=torch.float64)
    weights[torch.rand(500, 40) < 0.4] = 0.0
    weights[:, 30:] *= torch.rand(500, 1) < 0.5  # ids of no weight at the end of every other row
    sums = weights.cumsum(1)
    below_one = math.nextafter(1, 0)
    uniforms = [
        torch.rand(500, dtype=torch.float64),
        sums[:, 20] / sums[:, -1],  # between two ids
        *(torch.full((500,), u, dtype=torch.float64) for u in (0.0, below_one, 1.0)),
    ]
    for uniforms_R in uniforms:
        drawn = draw_ids(weights, uniforms_R).tolist()
        pairs = zip(weights.tolist(), uniforms_R.tolist(), strict=True)
        assert drawn == [slow_draw(*pair) for pair in pairs]
        assert all(weights[row, index] > 0 for row, index in enumerate(drawn))


@pytest.mark.parametrize(
    ("weights", "expected"),
    [([TINY, 0.0, 0.0], 0), ([0.0, TINY, TINY, TINY, 0.0], 3), ([0.0, TINY], 1)],
)
def test_a_product_that_is_rounded_up_to_the_sum_draws_the_last_id_of_positive_weight(
    weights, expected
):
    assert 0.9 * sum(weights) == sum(weights)
    drawn = draw_ids(
        torch.tensor([weights], dtype=torch.float64), torch.tensor([0.9], dtype=torch.float64)
    )
    assert drawn.tolist() == [expected] == [slow_draw(weights, 0.9)]


def test_the_sampler_leaves_the_drawn_token_alone_whatever_else_is_in_the_batch():
    torch.manual_seed(0)
    logits, uniforms = torch.randn(8, 30), torch.rand(8, 5, dtype=torch.float64)
    ids = torch.zeros(8, 3 + 2, dtype=torch.long)  # two tokens behind prompts of three

    def drawn(rows):
        sampler = TokenSampler(uniforms[rows], 3, lambda scores: scores.double().softmax(-1))
        return sampler(ids[rows], logits[rows])

    left = drawn(slice(None))
    assert (left > -torch.inf).sum(1).tolist() == [1] * 8 and left.max() == 0
    expected = [
        slow_draw(row.double().softmax(-1).tolist(), u)
        for row, u in zip(logits, uniforms[:, 2].tolist(), strict=True)
    ]
    assert left.argmax(1).tolist() == expected
    assert torch.equal(drawn(slice(3, 5)), left[3:5])


def test_a_stop_text_that_begins_in_the_prompt_ends_nothing(tiny_tokenizer):
    """Where transformers' own criterion would end the output before its first word."""
    tokenizer = load_tokenizer(str(tiny_tokenizer))
    prompt, line, word = (ids.tolist() for ids in tokenizer.encode(["it\n", "\n", "river"]))
    written = torch.tensor([[*prompt, *line], [*prompt, *line]])
    width = len(prompt)
    theirs = transformers.StopStringCriteria(tokenizer.pretrained, ["\n\n"])
    assert theirs(written, None).tolist() == [True, True]
    stopped = _Stopped(tokenizer, ["\n\n"], width)
    assert stopped(written, None).tolist() == [False, False]
    ended = torch.tensor([[*prompt, *word, *line, *line], [*prompt, *line, *word, *line]])
    assert stopped(ended, None).tolist() == [True, False]
