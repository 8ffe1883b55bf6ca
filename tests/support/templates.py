"""Chat templates and conversations for tests."""

from bigmix.text.formats import Conversation

OPEN, CLOSE = "<|im_start|>", "<|im_end|>"


CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' }}"
    "{% endfor %}"
)


GENERATION = (
    "{% for m in messages %}{% if m.role == 'assistant' %}{{ '<|im_start|>assistant\\n' }}"
    "{% generation %}{{ m.content }}{% endgeneration %}{{ '<|im_end|>\\n' }}"
    "{% else %}{{ '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' }}{% endif %}"
    "{% endfor %}"
)


GENERATION_WITH_END = GENERATION.replace(
    "{{ m.content }}{% endgeneration %}{{ '<|im_end|>\\n' }}",
    "{{ m.content + '<|im_end|>' }}{% endgeneration %}{{ '\\n' }}",
)


# It writes the last turn differently from the same turn with another after it.
LAST_THINKS = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\\n' }}"
    "{% if m.role == 'assistant' and loop.last %}{{ '<think>\\n\\n</think>\\n\\n' }}{% endif %}"
    "{{ m.content + '<|im_end|>\\n' }}{% endfor %}"
)


def chat(*contents, system=None):
    """A conversation in which user and assistant take turns, the user first."""
    turns = [{"role": "system", "content": system}] if system is not None else []
    roles = ("user", "assistant")
    turns += [{"role": roles[n % 2], "content": each} for n, each in enumerate(contents)]
    return Conversation(messages=turns, tools=None)


TALK = chat("Is it?", "It is so.", "Why? ", "混合 keeps\n\n  café.", system="Be brief.")
