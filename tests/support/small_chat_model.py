"""A small chat model that has learned a few conversations, with its tokenizer and template."""

from pathlib import Path

import torch
from support.templates import CLOSE, OPEN
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from bigmix.text.chat_template import encode_chat, open_template
from bigmix.text.formats import Conversation
from bigmix.text.tokenizer import load_tokenizer

VOCABULARY = 408  # more than the tokenizer has
# As many stock templates are: a system prompt of its own where the conversation has none, and the
# beginning of an answer where one is asked for.
CHAT_TEMPLATE = (
    "{% if messages[0].role != 'system' %}{{ '<|im_start|>system\\nbe seven<|im_end|>\\n' }}"
    "{% endif %}{% for m in messages %}"
    "{{ '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
NO_SYSTEM = (
    "{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}"
    + CHAT_TEMPLATE
)
ASKED = {
    "what is under the tower": "the bright river",
    "is it seven": "it was 12",
    "the river learns": "a tower keeps the river bright",
    "混合 is it": "知识 and the tower of 3.5",
    "what keeps it": "the river was under it",
    "who learns": "seven towers of the river keep to it",
}


def make_chat_model(folder: Path, tokenizer: Path, *, steps: int = 250, **settings) -> Path:
    """Write a chat model that answers the questions above, more or less, and ends its answers."""
    whole = AutoTokenizer.from_pretrained(tokenizer)
    whole.add_special_tokens({"additional_special_tokens": [OPEN, CLOSE]})
    whole.eos_token = CLOSE
    whole.chat_template = CHAT_TEMPLATE
    whole.save_pretrained(folder)
    torch.manual_seed(0)
    lm = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCABULARY,
            hidden_size=48,
            intermediate_size=96,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=512,
            bos_token_id=None,
            eos_token_id=whole.convert_tokens_to_ids(CLOSE),
            **settings,
        )
    )
    documents = list(_documents(str(folder)))
    adam = torch.optim.AdamW(lm.parameters(), lr=5e-3)
    for step in range(steps):
        ids = torch.tensor([documents[step % len(documents)]])
        lm(input_ids=ids, labels=ids).loss.backward()
        adam.step()
        adam.zero_grad()
    lm.generation_config.repetition_penalty = 5.0  # a model's own settings change no answer
    lm.save_pretrained(folder)
    return folder


def _documents(folder: str):
    tokenizer = load_tokenizer(folder)
    template = open_template(tokenizer, "tokenizer")
    for question, answer in ASKED.items():
        turns = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
        chat = encode_chat(tokenizer, template, Conversation(messages=turns, tools=None))
        yield chat.ids.tolist()
