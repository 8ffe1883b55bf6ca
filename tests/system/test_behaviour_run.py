"""A run measures how its model answers, from before the first step to after the last."""

import json
import shutil
import signal

import pytest
from support.chat_models import NEW_TOKENS, PROMPTS, TALKS, by_loop, make
from support.ranks import ROOT, environment, free_port, start_script
from support.runs import end, lines, start, wait_for, weights
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from bigmix.commands.main import main
from bigmix.commands.prepare.job import PrepareSettings, prepare
from bigmix.errors import BadInput
from bigmix.recipe import load_recipe
from bigmix.train.inputs import open_inputs

RECIPE = f"""\
model: {{path: base}}
sequence_length: 96
rows_per_step: 4
sources:
  chat: {{path: chat, role: task, share: 0.5, held_out: chat}}
  text: {{path: text, role: replay, share: 0.5}}
budget: {{steps: 5}}
train: {{lr: 1e-2, micro_batch_rows: 2, log_every: 1}}
evaluate: {{every: 2}}
behaviour: {{prompts: prompts.jsonl, max_new_tokens: {NEW_TOKENS}, batch_rows: 3, samples: 2}}
checkpoint: {{every: 2}}
deepspeed: ds_configs/cpu.json
output: run
"""
ALONE = "sources.chat.held_out=null"  # no held-out set is left


@pytest.fixture(scope="module")
def data(tmp_path_factory, tiny_tokenizer):
    folder = make(tmp_path_factory.mktemp("behaving"), tiny_tokenizer)
    rows = {
        "chat": [{"prompt": f"{q} {n}", "response": a[:9]} for n in range(8) for q, a in TALKS],
        "text": [{"text": f"{a} {q} {n}"} for n in range(8) for q, a in TALKS],
    }
    for name, of_source in rows.items():
        path = folder / f"{name}.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in of_source))
        settings = PrepareSettings(
            inputs=[str(path)], tokenizer=str(folder / "base"), output=str(folder / name)
        )
        prepare(settings, lambda *_: None)
    (folder / "recipe.yaml").write_text(RECIPE)
    return folder


@pytest.fixture(scope="module")
def run(data):
    """A run on two ranks; what it prints."""
    codes, said = end(start(data, 2))
    assert codes == [0, 0], said
    return said


def evaluations(folder):
    return {line["step"]: line for line in lines(folder) if "eval" in line}


def behaviour_of(line):
    return {key: value for key, value in line.items() if key.startswith("behaviour")}


def pairs_of(folder, step):
    path = folder / f"behaviour/step-{step:06d}.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_every_evaluation_has_the_numbers_of_a_loop(data, run):
    found = evaluations(data / "run")
    assert sorted(found) == [0, 2, 4, 5]
    assert found[0]["behaviour/forgetting"] == found[0]["behaviour/kl"] == 0
    assert found[0]["behaviour/same"] == 1 and found[0]["behaviour_prompts"] == len(PROMPTS)
    shutil.copytree(data / "run/export", data / "exported", dirs_exist_ok=True)
    expected = by_loop(data, "exported")
    tokens, nll, base_nll, kl = map(sum, zip(*expected["sums"], strict=True))
    last = found[5]
    assert last["behaviour/loss"] == pytest.approx(nll / tokens, abs=1e-6)
    assert found[0]["behaviour/loss"] == pytest.approx(base_nll / tokens, abs=1e-6)
    assert last["behaviour/kl"] == pytest.approx(kl / tokens, abs=1e-6)
    assert last["behaviour/forgetting"] == pytest.approx((nll - base_nll) / tokens, abs=1e-6)
    assert last["behaviour/forgetting"] > 0.01 and last["behaviour_tokens"] == tokens
    pairs = pairs_of(data / "run", 5)
    assert [pair["answer"] for pair in pairs] == expected["answer"]
    assert [pair["base"] for pair in pairs] == expected["base"]
    assert [pair["answer"] for pair in pairs_of(data / "run", 0)] == expected["base"]


def test_the_terminal_and_tensorboard_show_answers_side_by_side(data, run):
    assert f"behaviour: the model answers {len(PROMPTS)} prompts in every evaluation" in run
    assert "behaviour, step 5" in run and "answers, step 5" in run
    assert "what is under the tower" in run and "KL(base || model)" in run
    events = EventAccumulator(str(data / "run/tensorboard"), size_guidance={"tensors": 0}).Reload()
    curve = {event.step: event.value for event in events.Scalars("behaviour/forgetting")}
    assert sorted(curve) == [0, 2, 4, 5] and curve[0] == 0
    shown = events.Tensors("behaviour/samples/text_summary")
    assert [event.step for event in shown] == [0, 2, 4, 5]
    text = shown[-1].tensor_proto.string_val[0].decode()
    assert text.startswith("| prompt | base | now |") and "what is under the tower" in text
    card = (data / "run/export/README.md").read_text()
    found = evaluations(data / "run")[5]
    assert "## Behaviour" in card and f"Answers to {len(PROMPTS)} general prompts" in card
    assert f"| forgetting | {found['behaviour/forgetting']:.4f} (" in card


def test_without_the_probe_a_run_is_the_same_and_says_nothing_of_it(data, run):
    codes, said = end(start(data, 2, "behaviour=off", "output=unprobed"))
    assert codes == [0, 0], said
    off, probed = lines(data / "unprobed"), lines(data / "run")
    assert "behaviour" not in json.dumps(off) and "behaviour" not in said
    assert off == [
        {key: value for key, value in line.items() if key not in behaviour_of(line)}
        for line in probed
    ]
    assert weights(data / "unprobed") == weights(data / "run")
    assert not (data / "unprobed/behaviour").exists()


def test_a_base_that_is_no_chat_model_is_not_probed(data, tmp_path, monkeypatch):
    monkeypatch.chdir(data)
    shutil.copytree(data / "base", tmp_path / "mute")
    (tmp_path / "mute/chat_template.jinja").unlink()
    mute = f"model.path={tmp_path / 'mute'}"

    def opened(*words):
        return open_inputs(load_recipe("recipe.yaml", words), ranks=1, verify=False)

    assert opened().behaviour is not None and opened(ALONE).has_evaluation
    assert opened(mute).behaviour is None and not opened(mute, ALONE).has_evaluation
    with pytest.raises(BadInput, match="behaviour.when is ends, and no chat template"):
        opened(mute, "behaviour.when=ends")
    watch = "sources.text.share={controller: forgetting, limit: 1, held_out: [behaviour]}"
    opened(watch)
    with pytest.raises(BadInput, match="sources.text.share.held_out names behaviour, which is not"):
        opened(mute, watch)
    with pytest.raises(BadInput) as caught:
        opened("behaviour.prompts=gone.jsonl", "tasks.x={path: gone.jsonl, scores: [bleu]}")
    assert "gone.jsonl" in caught.value.faults[0] and len(caught.value.faults) == 2


def test_a_run_without_held_out_sets_is_evaluated_by_the_probe_alone(data):
    words = (ALONE, "output=alone", "behaviour.when=ends", "evaluate.every=1", "train.ema=0.5")
    codes, said = end(start(data, 1, *words))
    assert codes == [0], said
    found = evaluations(data / "alone")
    assert sorted(found) == [0, 5] and "at both ends" in said
    assert all(key in ("step", "eval") or key.startswith("behaviour") for key in found[5])
    # The averaged weights are those that are exported and those that are probed.
    shutil.copytree(data / "alone/export", data / "averaged", dirs_exist_ok=True)
    expected = by_loop(data, "averaged")
    tokens, nll, *_ = map(sum, zip(*expected["sums"], strict=True))
    assert found[5]["behaviour/loss"] == pytest.approx(nll / tokens, abs=1e-6)
    codes, said = end(start(data, 1, *words))
    assert codes == [0] and "is complete" in said, said


@pytest.mark.slow
def test_a_run_that_is_killed_in_the_middle_of_the_probe_ends_as_if_it_were_not(data):
    slow = {"prompts": "many.jsonl", "max_new_tokens": 30, "batch_rows": 1}
    many = [prompt | {"id": f"{n}-{at}"} for n in range(12) for at, prompt in enumerate(PROMPTS)]
    (data / "many.jsonl").write_text("".join(json.dumps(prompt) + "\n" for prompt in many))
    words = [f"behaviour.{key}={value}" for key, value in slow.items()]
    words.append("checkpoint.background=false")  # so that it is whole before the evaluation
    codes, said = end(start(data, 2, *words, "output=whole"))
    assert codes == [0, 0], said
    for step in (0, 2):
        killed = start(data, 2, *words, "output=killed")
        before = "log" if step == 0 else f"checkpoints/step-{step:06d}"
        wait_for(data / "killed" / before, killed)
        if step == 0:
            wait_for(data / "killed/metrics.jsonl", killed)
        for process in killed:
            process.send_signal(signal.SIGKILL)
        end(killed)
        assert not (data / f"killed/behaviour/step-{step:06d}.jsonl").exists()
    codes, said = end(start(data, 2, *words, "output=killed"))
    assert codes == [0, 0] and "going on after step 2" in said, said
    assert lines(data / "killed") == lines(data / "whole")
    assert weights(data / "killed") == weights(data / "whole")
    for name in ("base.npz", "step-000000.jsonl", "step-000002.jsonl", "step-000005.jsonl"):
        killed, whole = (data / folder / "behaviour" / name for folder in ("killed", "whole"))
        assert killed.read_bytes() == whole.read_bytes()


@pytest.fixture
def stopped(data, run, tmp_path):
    """The run as it was after step 4."""
    shutil.copytree(data / "run", tmp_path / "run")
    for path in ("checkpoints/step-000005", "export"):
        shutil.rmtree(tmp_path / "run" / path)
    (tmp_path / "run/checkpoints/latest").write_text("step-000004")
    return tmp_path / "run"


def resumed(data, folder, *words):
    codes, said = end(start(data, 1, f"output={folder}", *words))
    return codes[0], said


@pytest.mark.slow
def test_a_resume_measures_from_the_file_of_the_base(data, stopped):
    changed = ("behaviour.num_prompts=2", "behaviour.max_new_tokens=3")
    code, said = resumed(data, stopped, *changed)
    assert code == 0, said
    assert f"behaviour is measured with the {len(PROMPTS)} prompts" in said
    found, expected = (behaviour_of(evaluations(f)[5]) for f in (stopped, data / "run"))
    assert found == {key: pytest.approx(value, abs=1e-5) for key, value in expected.items()}


@pytest.mark.slow
def test_without_the_file_a_resume_says_that_nothing_is_compared(data, stopped):
    (stopped / "behaviour/base.npz").unlink()
    code, said = resumed(data, stopped)
    assert code == 0 and "base.npz is missing: from here on answers are measured, but not" in said
    line = evaluations(stopped)[5]
    assert "behaviour/instructions" in line and "behaviour/forgetting" not in line
    assert pairs_of(stopped, 5)[0]["base"] is None


@pytest.mark.slow
def test_a_damaged_file_and_that_of_another_run_are_refused(data, stopped):
    path = stopped / "behaviour/base.npz"
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])
    code, said = resumed(data, stopped)
    assert code == 2 and "base.npz in the run's folder is damaged" in said, said
    other = ["--base", str(data / "tuned"), "--prompts", str(data / "prompts.jsonl")]
    words = [*other, "--max-new-tokens", "4", "--output", str(stopped)]
    assert main(["probe", "behaviour", str(data / "tuned"), *words]) == 0
    code, said = resumed(data, stopped)
    assert code == 2 and "and the run has measured from" in said, said


@pytest.mark.slow
def test_the_runs_of_a_sweep_share_the_answers_of_the_base(data):
    codes, said = end(start(data, 2, "sweep.train.lr=[1e-2, 1e-3]", "output=swept"))
    assert codes == [0, 0], said
    assert "the evaluation before the first step is that of swept/lr-0.01" in said
    one, other = (data / "swept" / name / "seed-0" for name in ("lr-0.01", "lr-1e-3"))
    assert (one / "behaviour/base.npz").read_bytes() == (other / "behaviour/base.npz").read_bytes()
    assert evaluations(one)[0] == evaluations(other)[0]
    assert pairs_of(one, 0) == pairs_of(other, 0)
    last = [evaluations(folder)[5]["behaviour/forgetting"] for folder in (one, other)]
    assert last[1] < last[0]


@pytest.mark.slow
def test_the_command_measures_the_export_as_the_run_did(data, run):
    port = free_port()
    ranks = [
        start_script(ROOT / "launch/evaluate.py", data, environment(rank, 2, port), "recipe.yaml")
        for rank in range(2)
    ]
    codes, said = end(ranks)
    assert codes == [0, 0], said
    found = json.loads((data / "run/evaluation/evaluation.json").read_text())["lines"]
    for line, step in zip(found, (0, 5), strict=True):
        expected = behaviour_of(evaluations(data / "run")[step])
        assert behaviour_of(line) == {
            key: pytest.approx(value, rel=1e-5, abs=1e-6) for key, value in expected.items()
        }
        assert pairs_of(data / "run/evaluation", step) == pairs_of(data / "run", step)
    assert (data / "run/evaluation/behaviour/base.npz").is_file()
    assert "behaviour, run/export" in said


@pytest.mark.slow
def test_a_controller_holds_what_is_forgotten_of_behaviour(data):
    watch = "sources.text.share={controller: forgetting, limit: 0.05, held_out: [behaviour]}"
    codes, said = end(start(data, 2, watch, "output=controlled", "checkpoint.export=false"))
    assert codes == [0, 0], said
    found = evaluations(data / "controlled")
    assert found[2]["behaviour/forgetting"] > 0.05 and found[2]["share/text"] > 0.25
    newest = json.loads((data / "controlled/checkpoints/step-000005/checkpoint.json").read_text())
    first = newest["position"]["decisions"][0]
    assert first["forgetting"]["behaviour"] == found[2]["behaviour/forgetting"]
