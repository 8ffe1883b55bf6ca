"""A chat model that learns a task while its own answers and its own texts are replayed: what the
run logs is what plain models measure document by document.
"""

import json

import numpy as np
import pytest
import torch
from support.commands import printed
from support.corpora import generated_texts
from support.runs import end, lines, start
from support.small_chat_model import make_chat_model
from transformers import AutoModelForCausalLM

from bigmix.data.loader import step_batch
from bigmix.data.records import RankRows
from bigmix.recipe import load_recipe
from bigmix.train.inputs import open_inputs

pytestmark = pytest.mark.slow
RANKS = 2
RECIPE = """\
model: {path: model}
sequence_length: 128
rows_per_step: 16
sources:
  task: {path: task, role: task, share: 0.5}
  answers: {path: answers, role: replay, share: 0.25, held_out: answers-held-out}
  texts: {path: texts, role: replay, share: 0.25}
reference: {model: other, sources: {answers: 0.7}}
budget: {steps: 3}
train: {lr: 3e-3, clip: 0, micro_batch_rows: 2, log_every: 1}
evaluate: {every: 1, kl: true}
behaviour: "off"
checkpoint: {export: false}
deepspeed: ds_configs/cpu.json
output: run
"""
SHARES = {"task": 0.5, "answers": 0.25, "texts": 0.25}
KAPPA = 0.7


@pytest.fixture(scope="module")
def data(tiny_tokenizer, tmp_path_factory):
    """A chat model, the same after less training, its sources, and two runs."""
    folder = tmp_path_factory.mktemp("replay")
    make_chat_model(folder / "model", tiny_tokenizer)
    make_chat_model(folder / "other", tiny_tokenizer, steps=60)
    texts = [{"text": text} for text in generated_texts(300, seed=3)]
    (folder / "task.jsonl").write_text("".join(json.dumps(each) + "\n" for each in texts))
    printed(folder, "prepare", "task.jsonl", "--tokenizer", "model", "--output", "task")
    replay = ("self-replay", "model", "--max-tokens", "30")
    chats = ("--kind", "chat", "--tokens", "1500", "--held-out", "0.2")
    printed(folder, *replay, *chats, "--output", "answers")
    printed(folder, *replay, "--tokens", "3000", "--output", "texts")
    (folder / "recipe.yaml").write_text(RECIPE)
    codes, said = end(start(folder, RANKS))
    assert codes == [0] * RANKS, said
    assert "is a chat model and no source of chats" not in said
    codes, said = end(start(folder, RANKS, "output=one-way", *ONE_WAY))
    assert codes == [0] * RANKS, said
    assert "model is a chat model and no source of chats is replayed" in said
    return folder


ONE_WAY = [
    "sources={task: {path: task, role: task, share: 1}}",
    "held_out={answers: answers-held-out}",
    "reference=null",
    "budget={task_tokens: 3072}",
]


def documents_of_first_step(folder, monkeypatch):
    """For each source the ids of its documents in step 1, and which of them are in the loss."""
    monkeypatch.chdir(folder)
    recipe = load_recipe("recipe.yaml")
    plan = open_inputs(recipe, ranks=RANKS, verify=False).plan
    found = {name: [] for name in recipe.sources}
    for rank in range(RANKS):
        rows = RankRows(rank=rank, ranks=RANKS, rows_per_step=16, micro_batch_rows=2)
        for batch in step_batch(plan, rows, 1).micro_batches:
            ids = batch.ids_BT.reshape(-1)
            learned = np.zeros(len(ids) + 1, bool)
            learned[batch.kept_N + 1] = True
            ends = [*batch.starts_P[1:].tolist(), len(ids)]
            for begin, stop, source in zip(
                batch.starts_P.tolist(), ends, batch.groups_P.tolist(), strict=True
            ):
                flags = learned[begin:stop].copy()
                flags[0] = False  # its prediction would be that of the part before
                if flags.any():
                    found[plan.mixture.names[source]].append((ids[begin:stop], flags))
    return found


def test_the_first_step_is_that_of_plain_models(data, monkeypatch):
    """Loss, KL to the reference and the norm of the gradient, in fp64 without packing."""
    model, reference = (
        AutoModelForCausalLM.from_pretrained(data / name).double() for name in ("model", "other")
    )
    documents = documents_of_first_step(data, monkeypatch)
    counts = {s: sum(int(f.sum()) for _, f in own) for s, own in documents.items()}
    nll, kl = dict.fromkeys(counts, 0.0), dict.fromkeys(counts, 0.0)
    for source, own in documents.items():
        for ids, flags in own:
            shown = torch.tensor(ids.astype(np.int64))[None]
            kept = torch.tensor(flags[1:])
            log_p = model(input_ids=shown).logits[0, :-1][kept].log_softmax(1)
            with torch.no_grad():
                log_q = reference(input_ids=shown).logits[0, :-1][kept].log_softmax(1)
            nll[source] = nll[source] - log_p.gather(1, shown[0, 1:][kept][:, None]).sum()
            kl[source] = kl[source] + (log_q.exp() * (log_q - log_p)).sum()
    value = sum(SHARES[s] * nll[s] / counts[s] for s in counts)
    value = value + KAPPA * kl["answers"] / counts["answers"]
    value.backward()
    norm = torch.cat([p.grad.flatten() for p in model.parameters()]).norm()
    first = next(line for line in lines(data / "run") if line["step"] == 1 and "loss/task" in line)
    for source, count in counts.items():
        assert first[f"loss_tokens/{source}"] == count
        assert first[f"loss/{source}"] == pytest.approx(float(nll[source].detach() / count))
    mean_kl = float(kl["answers"].detach() / counts["answers"])
    assert mean_kl > 0.05
    assert first["kl/answers"] == pytest.approx(mean_kl, rel=1e-4)
    assert "kl/texts" not in first and "kl/task" not in first
    assert first["grad_norm"] == pytest.approx(float(norm), rel=1e-4)


def test_answers_are_evaluated_with_forgetting_and_divergence_from_the_base(data):
    evaluations = [line for line in lines(data / "run") if "held_out_loss/answers" in line]
    assert [line["step"] for line in evaluations] == [0, 1, 2, 3]
    assert evaluations[0]["forgetting/answers"] == 0
    assert evaluations[0]["kl_to_base/answers"] == pytest.approx(0, abs=1e-6)
    assert evaluations[-1]["kl_to_base/answers"] > 0


def test_plan_and_compare_know_replayed_answers(data):
    plan = json.loads(printed(data, "plan", "recipe.yaml", "--gpus", "2", "--gpu", "cpu", "--json"))
    answers = plan["sources"]["answers"]
    assert (answers["role"], answers["kind"]) == ("replay", "chat")
    assert not [warning for warning in plan["warnings"] if "replayed" in warning]
    alone = printed(data, "plan", "recipe.yaml", *ONE_WAY, "--gpu", "cpu", "--json")
    assert [w for w in json.loads(alone)["warnings"] if "no source of chats is replayed" in w]
    printed(data, "compare", "one-way", "run", "--out", "compared")
    summary = json.loads((data / "compared" / "summary.json").read_text())
    assert "answers" in json.dumps(summary)
    assert "answers" in (data / "compared" / "table.md").read_text()
