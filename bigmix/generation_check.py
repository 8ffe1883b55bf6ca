"""The folder of an export goes in, loaded anew; what the model says behind a prompt comes out."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import transformers

from bigmix.data.records import IGNORE
from bigmix.data.stream import Stream
from bigmix.errors import BigmixError
from bigmix.model.causal_lm import max_positions
from bigmix.text.tokenizer import load_tokenizer

LARGEST_GIB = 8.0  # of weights that are loaded a second time, beside what the run holds
_LONGEST_PROMPT, _SHORTEST_PROMPT, _CONTINUATION = 64, 8, 24  # tokens


@dataclass(frozen=True, kw_only=True, slots=True)
class Said:
    """A prompt and its most probable continuation; as text where the folder has a tokenizer, else as ids."""

    prompt: str
    continuation: str


def prompt_of(streams: Sequence[Stream]) -> Sequence[int]:
    """The beginning of the first document that can be read: of a chat up to its first answer, of a text its first tokens."""
    for stream in streams:
        try:
            row = stream.read(stream.in_shard_order()[0])
        except BigmixError:  # a shard that is out of reach is no reason to do without the check
            continue
        end = int(row.starts_P[1]) if len(row.starts_P) > 1 else row.tokens
        ids = row.ids_T[:end].tolist()
        in_loss = [at for at, label in enumerate(row.labels_T[:end].tolist()) if label != IGNORE]
        first = in_loss[0] + 1 if in_loss and in_loss[0] > 0 else _SHORTEST_PROMPT
        prompt: list[int] = ids[: min(first, end - 1)][-_LONGEST_PROMPT:]
        if prompt:
            return prompt
    return []


def size_gib(folder: Path) -> float:
    """The weights of a folder."""
    return sum(path.stat().st_size for path in folder.glob("*.safetensors")) / 2**30


def check_generation(folder: Path, prompt: Sequence[int]) -> Said:
    """Load a folder as any other program would, on the CPU, and let it go on from a prompt greedily."""
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype="auto").eval()
    room = max_positions(model.config) or _LONGEST_PROMPT + _CONTINUATION
    ids_BT = torch.tensor([list(prompt)])[:, : max(1, room - _CONTINUATION)]
    with torch.no_grad():
        made_BT = model.generate(
            ids_BT,
            attention_mask=torch.ones_like(ids_BT),
            max_new_tokens=min(_CONTINUATION, room - ids_BT.shape[1]),
            do_sample=False,
            pad_token_id=0,  # of one row nothing is padded; without it there is a warning
        )
    shown, new = ids_BT[0].tolist(), made_BT[0, ids_BT.shape[1] :].tolist()
    if not (folder / "tokenizer.json").is_file():
        return Said(prompt=str(shown), continuation=str(new))
    tokenizer = load_tokenizer(str(folder))
    return Said(prompt=tokenizer.decode(shown), continuation=tokenizer.decode(new))
