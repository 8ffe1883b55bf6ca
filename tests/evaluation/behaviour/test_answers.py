"""What a template or a model cannot take is left out, and counted; the rest has its own tokens."""

import io

import pytest
from support.templates import CHATML, LAST_THINKS
from transformers import AutoTokenizer

from bigmix.errors import BadInput
from bigmix.evaluation.behaviour.answers import prepare_behaviour, probe_for_model
from bigmix.evaluation.behaviour.inputs import BehaviourInputs, open_behaviour
from bigmix.evaluation.behaviour.prompts import read_prompts
from bigmix.recipe.sections import Behaviour
from bigmix.terminal import Terminal

NO_SYSTEM = (
    "{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}"
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)


def inputs_of(tokenizer, **settings):
    return open_behaviour(Behaviour(**settings), tokenizer.name)


def test_prompts_have_the_tokens_of_transformers_own_rendering(with_template):
    inputs = inputs_of(with_template(NO_SYSTEM))
    probe = prepare_behaviour(inputs, None)
    with_system = [p for p in inputs.prompts if p.messages[0]["role"] == "system"]
    assert 0 < len(with_system) == probe.left_out["refused by template"]
    assert len(probe.chat.prompts) == len(inputs.prompts) - len(with_system)
    own = AutoTokenizer.from_pretrained(inputs.tokenizer)
    for prompt, tokens in zip(probe.chat.prompts, probe.chat.tokens, strict=True):
        text = own.apply_chat_template(
            list(prompt.messages), add_generation_prompt=True, tokenize=False
        )
        assert list(tokens) == own.encode(text, add_special_tokens=False)


def test_an_answer_begins_where_it_does_in_training(with_template):
    """Where a template writes empty thoughts before an answer, they belong to the prompt."""
    inputs = inputs_of(with_template(LAST_THINKS), num_prompts=4)
    probe = prepare_behaviour(inputs, None)
    for tokens in probe.chat.tokens:
        assert probe.tokenizer.decode(tokens).endswith("<think>\n\n</think>\n\n")


def test_prompts_that_do_not_fit_the_model_are_left_out(with_template):
    inputs = inputs_of(with_template(CHATML), max_new_tokens=50)
    lengths = [len(tokens) for tokens in prepare_behaviour(inputs, None).chat.tokens]
    positions = sorted(lengths)[len(lengths) // 2] + 50
    probe = prepare_behaviour(inputs, positions)
    num_long = sum(length + 50 > positions for length in lengths)
    assert 0 < num_long == probe.left_out["longer than the model's positions"]
    assert len(probe.chat.tokens) == len(lengths) - num_long
    with pytest.raises(BadInput, match=r"no prompt .* can be put to the model \(\d+ longer"):
        prepare_behaviour(inputs, 50)


def test_a_template_that_renders_nothing_is_refused_with_what_to_do(with_template):
    broken = with_template("{{ raise_exception('no chats') }}")
    inputs = BehaviourInputs(
        settings=Behaviour(), prompts=read_prompts(None, ("en",)), tokenizer=broken.name
    )
    with pytest.raises(BadInput, match=r"cannot render .* or set behaviour=off"):
        prepare_behaviour(inputs, None)


def test_a_probe_that_nothing_asked_for_is_left_out_with_a_warning(with_template):
    """One that the recipe or a controller asks for is refused."""
    tokenizer, out = with_template(CHATML), io.StringIO()
    terminal = Terminal(file=out)
    assert probe_for_model(inputs_of(tokenizer), 50, terminal) is None
    assert "behaviour is not measured: no prompt" in out.getvalue()
    for settings, is_needed in (({"when": "every"}, False), ({}, True)):
        with pytest.raises(BadInput, match="no prompt"):
            probe_for_model(inputs_of(tokenizer, **settings), 50, terminal, is_needed=is_needed)
