"""The prompts that self-replay of chats begins with: they are many, and other than the probe's."""

import json
import re
from collections import Counter, defaultdict
from pathlib import Path

import bigmix.commands.remedies
from bigmix.evaluation.behaviour.prompts import LANGUAGES, read_prompts

FOLDER = Path(bigmix.commands.remedies.__file__).parent
SEEDS = [
    json.loads(line) for line in (FOLDER / "seeds.jsonl").read_text(encoding="utf-8").splitlines()
]
SYSTEMS = [
    json.loads(line) for line in (FOLDER / "systems.jsonl").read_text(encoding="utf-8").splitlines()
]
MOST_SHARED = 0.35  # of the 4-grams of the shorter one of two prompts


def grams(text):
    """All runs of four words, of which each Chinese character is one."""
    words = re.findall(r"[\u4e00-\u9fff]|[^\W\u4e00-\u9fff]+", text.lower())
    return {tuple(words[at : at + 4]) for at in range(len(words) - 3)}


def near_duplicates(ones, others):
    """Pairs of different texts that share more 4-grams than they may."""
    by_gram = defaultdict(set)
    sets = {text: grams(text) for text in {*ones, *others}}
    for text in others:
        for gram in sets[text]:
            by_gram[gram].add(text)
    for one in ones:
        shared = Counter(other for gram in sets[one] for other in by_gram[gram] if other != one)
        for other, count in shared.items():
            if count > MOST_SHARED * min(len(sets[one]), len(sets[other])):
                yield one, other


def test_there_are_many_seeds_on_many_topics_in_both_languages():
    languages = Counter(seed["language"] for seed in SEEDS)
    assert languages["en"] >= 340 and languages["zh"] >= 160
    for language in LANGUAGES:
        topics = Counter(seed["topic"] for seed in SEEDS if seed["language"] == language)
        assert len(topics) >= 24 and min(topics.values()) >= 5
        assert max(topics.values()) <= 0.1 * languages[language]


def test_a_seed_has_an_id_of_its_own_its_language_and_one_prompt():
    assert len({seed["id"] for seed in SEEDS}) == len(SEEDS)
    assert len({seed["prompt"] for seed in SEEDS}) == len(SEEDS)
    for seed in SEEDS:
        assert seed.keys() == {"id", "language", "topic", "prompt"}
        assert re.fullmatch(rf"seed-{seed['language']}-\d{{4}}", seed["id"])
        assert seed["prompt"] == seed["prompt"].strip() != ""
        num_chinese = len(re.findall(r"[\u4e00-\u9fff]", seed["prompt"]))
        assert (num_chinese >= 4) == (seed["language"] == "zh"), seed


def test_system_prompts_are_of_both_languages():
    assert len({each["system"] for each in SYSTEMS}) == len(SYSTEMS) >= 24
    assert all(each.keys() == {"language", "system"} for each in SYSTEMS)
    assert Counter(each["language"] for each in SYSTEMS)["zh"] >= 6


def test_no_seed_is_close_to_a_prompt_of_the_behaviour_probe():
    probed = [
        turn["content"] for prompt in read_prompts(None, LANGUAGES) for turn in prompt.messages
    ]
    seeds = [seed["prompt"] for seed in SEEDS]
    assert list(near_duplicates(seeds, probed)) == []
    assert list(near_duplicates([each["system"] for each in SYSTEMS], probed)) == []


def test_no_two_seeds_are_close_to_each_other():
    seeds = [seed["prompt"] for seed in SEEDS]
    assert list(near_duplicates(seeds, seeds)) == []


def test_what_is_close_is_found():
    probed = ["Write a short poem about the first snow of the winter."]
    assert list(near_duplicates(["Write a short poem about the first rain."], probed))
    assert not list(near_duplicates(["Write a short letter about the snow."], probed))
