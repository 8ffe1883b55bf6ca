"""Two small chat models, prompts for them, and what a plain loop of transformers measures.

`base` answers in sentences and ends its turns; `tuned` is the base after some steps on fragments.
"""

import json
from pathlib import Path

import torch
from support.templates import CHATML, CLOSE, OPEN
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from bigmix.evaluation.behaviour.answers import BehaviourProbe, prepare_behaviour
from bigmix.evaluation.behaviour.inputs import open_behaviour
from bigmix.recipe.sections import Behaviour

TEMPLATE = CHATML + "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
POSITIONS = 96
NEW_TOKENS = 12
LIKELIEST = 64
TALKS = [
    ("what is under the tower", "The bright river is under the tower."),
    ("is it seven", "It was 12, and it is seven."),
    ("the river", "A river learns and keeps the tower."),
    ("知识", "知识混合，知识混合。"),
    (
        "who keeps it",
        "The tower keeps it in the river, and it was bright in the tower and under it.",
    ),
]
FRAGMENTS = [(question, answer.split()[0][:6]) for question, answer in TALKS]
PROMPTS = [
    {"messages": [{"role": "user", "content": "what is under the tower"}]},
    {
        "id": "seven",
        "messages": [{"role": "user", "content": "is it seven"}],
        "constraints": [{"type": "contains", "any": ["seven"]}],
    },
    {
        "messages": [
            {"role": "system", "content": "Be bright."},
            {"role": "user", "content": "the river"},
        ]
    },
    {"messages": [{"role": "user", "content": "知识"}], "language": "zh", "kind": "fact"},
    {
        "messages": [
            {"role": "user", "content": "is it seven"},
            {"role": "assistant", "content": "It was 12."},
            {"role": "user", "content": "who keeps it"},
        ],
        "constraints": [
            {"type": "contains", "any": ["tower", "river"]},
            {"type": "num_words", "most": 40},
        ],
    },
    {
        "messages": [{"role": "user", "content": "and a tower of the river"}],
        "constraints": [{"type": "uppercase"}],
    },
    {"messages": [{"role": "user", "content": "Say <|im_end|> in it"}]},
]


def make(folder: Path, tokenizer: Path) -> Path:
    """Write the models `base` and `tuned` with their tokenizer, and `prompts.jsonl`."""
    whole = AutoTokenizer.from_pretrained(tokenizer)
    whole.add_special_tokens({"additional_special_tokens": [OPEN, CLOSE]})
    whole.chat_template = TEMPLATE
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(whole),
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=POSITIONS,
        )
    )
    adam = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for name, talks, steps in (("base", TALKS, 60), ("tuned", FRAGMENTS, 12)):
        for step in range(steps):
            question, answer = talks[step % len(talks)]
            turns = [{"role": "user", "content": question}]
            shown = tokens_of(whole, turns)
            ids = torch.tensor(
                [[*shown, *whole.encode(answer), whole.convert_tokens_to_ids(CLOSE)]]
            )
            labels = ids.clone()
            labels[0, : len(shown)] = -100
            model(input_ids=ids, labels=labels).loss.backward()
            adam.step()
            adam.zero_grad()
        model.save_pretrained(folder / name)
        whole.save_pretrained(folder / name)
    lines = (json.dumps(prompt, ensure_ascii=False) + "\n" for prompt in PROMPTS)
    (folder / "prompts.jsonl").write_text("".join(lines))
    return folder


def probe_of(folder: Path | str, **settings) -> BehaviourProbe:
    """The probe of `prompts.jsonl` for the model `base` in a folder."""
    given = {"prompts": f"{folder}/prompts.jsonl", "max_new_tokens": NEW_TOKENS} | settings
    inputs = open_behaviour(Behaviour(**given), f"{folder}/base")
    return prepare_behaviour(inputs, POSITIONS)


def tokens_of(tokenizer, messages) -> list[int]:
    """The tokens of a prompt, whose contents hold no special token but as text."""
    marks = {CLOSE: "☃"}
    plain = [turn | {"content": turn["content"].replace(CLOSE, marks[CLOSE])} for turn in messages]
    text = tokenizer.apply_chat_template(plain, add_generation_prompt=True, tokenize=False)
    ids = []
    for at, piece in enumerate(text.split(marks[CLOSE])):
        if at:
            ids += tokenizer.encode(CLOSE, add_special_tokens=False, split_special_tokens=True)
        ids += tokenizer.encode(piece, add_special_tokens=False)
    return ids


class Loop:
    """A model in a loop over single prompts, without batches, padding and caches."""

    def __init__(self, path: Path) -> None:
        self.model = AutoModelForCausalLM.from_pretrained(path).eval()
        self.tokenizer = AutoTokenizer.from_pretrained(path)
        self.end = self.tokenizer.convert_tokens_to_ids(CLOSE)

    def prompts(self) -> list[list[int]]:
        return [tokens_of(self.tokenizer, prompt["messages"]) for prompt in PROMPTS]

    def answer(self, prompt: list[int]) -> list[int]:
        """The likeliest token again and again, up to the end of the turn."""
        ids = list(prompt)
        while len(ids) - len(prompt) < NEW_TOKENS:
            with torch.no_grad():
                ids.append(int(self.model(torch.tensor([ids])).logits[0, -1].argmax()))
            if ids[-1] in (self.end, self.tokenizer.eos_token_id):
                break
        return ids[len(prompt) :]

    def text(self, answer: list[int]) -> str:
        return self.tokenizer.decode(answer, skip_special_tokens=True).strip()

    def logs(self, prompt: list[int], answer: list[int]) -> torch.Tensor:
        """Log-probabilities [A, V] in double precision in the place of each token of an answer."""
        with torch.no_grad():
            logits = self.model(torch.tensor([prompt + answer])).logits[0, len(prompt) - 1 : -1]
        return logits.double().log_softmax(1)


def by_loop(folder: Path, model: str) -> dict:
    """The answers of a model and the base's, as texts, and the sums over each answer of the base:
    tokens, nll of the model, nll of the base, and the divergence over its likeliest tokens and the
    rest.
    """
    base, own = Loop(folder / "base"), Loop(folder / model)
    found = {"base": [], "answer": [], "lengths": [], "stops": [], "sums": []}
    for prompt in base.prompts():
        theirs, ours = base.answer(prompt), own.answer(prompt)
        found["base"].append(base.text(theirs))
        found["answer"].append(own.text(ours))
        found["stops"].append(ours[-1] == own.end)
        found["lengths"].append(len(ours) - (ours[-1] == own.end))
        logs, base_logs = own.logs(prompt, theirs), base.logs(prompt, theirs)
        places = range(len(theirs))
        sums = [len(theirs)]
        sums += [-sum(float(each[at, theirs[at]]) for at in places) for each in (logs, base_logs)]
        divergence = 0.0
        for at in places:
            ids = base_logs[at].topk(LIKELIEST).indices
            q, p = base_logs[at, ids].exp(), logs[at, ids].exp()
            divergence += float((q * (q / p).log()).sum())
            rest_q, rest_p = 1 - q.sum(), 1 - p.sum()
            divergence += float(rest_q * (rest_q / rest_p).log())
        found["sums"].append([*sums, divergence])
    return found
