"""Texts that are generated together are those that are generated one by one."""

import numpy as np
import pytest
import torch
import transformers
from support.models import FAMILIES, VOCABULARY

from bigmix.commands.remedies.generator import TextGenerator, rows_in
from bigmix.commands.remedies.row_cache import GenerationRequest, can_exchange_rows

OTHERS = {
    "bloom": {
        "model_type": "bloom",
        "vocab_size": VOCABULARY,
        "hidden_size": 32,
        "n_layer": 2,
        "n_head": 4,
    },
    "mamba": {
        "model_type": "mamba",
        "vocab_size": VOCABULARY,
        "hidden_size": 32,
        "state_size": 4,
        "num_hidden_layers": 2,
    },
}
ENDS = tuple(range(3, 12))
BARRED = (0, 1, 50)


def model_of(family, **changes):
    torch.manual_seed(0)
    settings = (FAMILIES | OTHERS)[family] | changes
    config = transformers.AutoConfig.for_model(
        settings.pop("model_type"), **settings, initializer_range=0.4
    )
    return transformers.AutoModelForCausalLM.from_config(config).eval()


def barred():
    found = torch.zeros(VOCABULARY, dtype=torch.bool)
    found[list(BARRED)] = True
    return found


def requests(count, *, most, longest_prompt):
    draw = np.random.default_rng(1)
    for number in range(count):
        yield GenerationRequest(
            number=number,
            prompt=draw.integers(3, VOCABULARY, int(draw.integers(1, longest_prompt))).tolist(),
            uniforms_T=draw.random(int(draw.integers(1, most))),
            temperature=(0.0, 0.7, 1.0)[number % 3],
        )


def one_by_one(lm, request, ends, top_p):
    """The slow way: the whole text is read for each token."""
    ids = []
    for uniform in request.uniforms_T:
        with torch.no_grad():
            shown = torch.tensor([[*request.prompt, *ids]])
            logits = lm(input_ids=shown).logits[0, -1].double()
        logits[list(BARRED)] = -torch.inf
        if request.temperature == 0:
            token = int(logits.argmax())
        else:
            chances = (logits / request.temperature).softmax(0)
            order = chances.sort(descending=True, stable=True)
            kept = order.indices[order.values.cumsum(0) - order.values < top_p]
            chances = torch.where(torch.isin(torch.arange(VOCABULARY), kept), chances, 0.0)
            heights = chances.cumsum(0)
            token = int((heights <= uniform * heights[-1]).sum())
        if token in ends:
            return ids, False
        ids.append(token)
    return ids, True


def generated(lm, asked, *, ends=ENDS, top_p=1.0, num_rows=4):
    generator = TextGenerator(lm, ends=ends, barred_V=barred(), top_p=top_p, num_rows=num_rows)
    waiting = iter(asked)
    completions = list(generator.completions(lambda: next(waiting, None)))
    assert sorted(each.request.number for each in completions) == [r.number for r in asked]
    return {each.request.number: (each.ids, each.is_cut) for each in completions}


@pytest.mark.parametrize("family", [*FAMILIES, *OTHERS])
def test_texts_do_not_depend_on_the_texts_beside_them(family):
    lm = model_of(family)
    assert can_exchange_rows(lm) == (family in FAMILIES)
    asked = list(requests(15, most=24, longest_prompt=20))
    found = generated(lm, asked, top_p=0.9)
    expected = {request.number: one_by_one(lm, request, ENDS, 0.9) for request in asked}
    assert found == expected
    assert len({is_cut for _, is_cut in found.values()}) == 2  # some end, some are cut


def test_rows_go_on_where_the_cache_is_full_and_prompts_become_longer():
    lm = model_of("llama", max_position_embeddings=512)
    asked = sorted(requests(9, most=260, longest_prompt=150), key=lambda r: len(r.prompt))
    assert len(asked[-1].prompt) > 100 and max(len(r.uniforms_T) for r in asked) > 200
    asked = [
        GenerationRequest(
            number=number,
            prompt=r.prompt,
            uniforms_T=r.uniforms_T,
            temperature=r.temperature,
        )
        for number, r in enumerate(asked)
    ]
    found = generated(lm, asked, ends=(95,), num_rows=2)
    assert found == {r.number: one_by_one(lm, r, (95,), 1.0) for r in asked}


def test_a_request_may_come_later_than_the_end_of_all_rows():
    lm = model_of("llama")
    asked = list(requests(6, most=8, longest_prompt=5))
    waiting = list(reversed(asked))
    refusals = iter([False, False, True] * 50)
    generator = TextGenerator(lm, ends=ENDS, barred_V=barred(), top_p=1.0, num_rows=2)
    found = {}
    while waiting:  # a caller that has requests again asks for completions again
        for each in generator.completions(
            lambda: waiting.pop() if waiting and not next(refusals) else None
        ):
            found[each.request.number] = (each.ids, each.is_cut)
    assert found == {r.number: one_by_one(lm, r, ENDS, 1.0) for r in asked}


def test_rows_are_as_many_as_their_keys_and_values_fit_into_memory():
    llama = model_of("llama").config  # 2 layers, 2 heads of keys and values, each of size 8
    row_bytes = 2 * 2 * 2 * 2 * 8 * 100
    assert rows_in(llama, 100, 5 * row_bytes + 1) == 5
    assert rows_in(llama, 100, row_bytes - 1) == 1
    assert rows_in(llama, 100, 10_000 * row_bytes) == 256
    gpt2 = model_of("gpt2").config  # 4 heads, all of them cached
    assert rows_in(gpt2, 100, 5 * 2 * row_bytes) == 5
    assert rows_in(model_of("mamba").config, 100, 10**12) == 64
