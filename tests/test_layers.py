"""Imports go one way, and the cluster lives in two modules."""

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parent.parent / "bigmix"
LAYERS = [
    {"errors", "files", "records", "world", "waiting", "processes", "data.statistics", "data.duplicates"},
    {"data.location", "weighing", "data.quarantine", "weight_files"},
    {"data.retry"},
    {"data.http", "data.pipe"},
    {"data.storage"},
    {"data.cache"},
    {"data.fetch_ahead"},
    {
        "recipe", "objective", "schedule", "dist", "data.tars", "data.workers", "data.manifest", "data.shares",
        "data.order", "zero_state",
    },
    {"controller", "sizes"},
    {
        "data.recognise", "data.substitution", "data.sentencepiece_model", "data.token_bytes", "data.shards", "data.packing", "data.mixture", "loss", "ds_config",
        "metrics", "terminal", "guard", "beats", "health", "quickstart.corpus", "data.progress", "data.picture",
    },
    {"data.documents", "data.tokenizer", "model", "flops", "data.rows", "engine", "watchdog", "supervisor", "bootstrap"},
    {"on_device"},
    {"reference"},
    {
        "data.chat_tokens", "data.parts", "data.prepare_settings", "data.merge", "data.stream", "model_checks", "step",
        "checkpoint",
    },
    {"data.chat", "data.part_rows", "data.assemble", "data.source", "soundness", "run_listing", "last_word", "held_out"},
    {"run_folder"},
    {"data.tokenise", "data.loader", "evaluate", "export", "frozen", "tasks", "data.raw_documents", "probe.facts"},
    {"probe.plant"},
    {"probe.score"},
    {"suspects", "data.part_writer", "data.tally", "mixing", "report", "source_checks"},
    {"data.prepare", "inputs", "held_out_inputs", "examine"},
    {"plan", "self_replay", "sweep_inputs", "first_evaluation"},
    {"header", "compare", "preview", "model_card", "generation_check"},
    {"average"},
    {"set_up", "assess"},
    {"recovery", "steering"},
    {"loop"},
    {"train"},
    {"sweep"},
    {"cli"},
    {"rank"},
]  # fmt: skip
WHOLE = {
    "recipe",
    "compare",
    "cli",
    "loss",
    "plan",
    "checkpoint",
    "tasks",
}  # packages that are one part
MODULES = {
    str(path.relative_to(PACKAGE).with_suffix("")).replace("/", "."): path
    for path in PACKAGE.rglob("*.py")
    if path.name != "__init__.py" or path.parent.name in WHOLE
}


def part_of(module):
    """recipe.load is of the part recipe; packages that are one part hide their modules from the others."""
    module = module.removesuffix(".__init__")
    first = module.split(".")[0]
    return first if first in WHOLE else module


def layer_of(part):
    return next(index for index, layer in enumerate(LAYERS) if part in layer)


def imports_of(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: a relative import"
            for alias in node.names:
                yield f"{node.module}.{alias.name}"


def own_parts(path):
    for name in imports_of(path):
        if name.startswith("bigmix."):
            inner = name.removeprefix("bigmix.")
            while inner and inner not in MODULES and f"{inner}.__init__" not in MODULES:
                inner = inner.rpartition(".")[0]
            if inner:
                yield part_of(inner)


@pytest.mark.parametrize("module", sorted(MODULES))
def test_a_module_imports_only_from_earlier_layers(module):
    part = part_of(module)
    for other in own_parts(MODULES[module]):
        assert other == part or layer_of(other) < layer_of(part), f"{module} imports {other}"


def test_the_list_names_every_part_and_no_other():
    assert {part_of(module) for module in MODULES} == set().union(*LAYERS)


def test_the_cluster_lives_in_two_modules():
    users = {"torch.distributed": set(), "deepspeed": set()}
    for module, path in MODULES.items():
        for name in imports_of(path):
            for library, found in users.items():
                if name == library or name.startswith(library + "."):
                    found.add(module)
    assert users == {"torch.distributed": {"dist"}, "deepspeed": {"engine"}}


def test_nothing_prints_but_the_commands():
    for module, path in MODULES.items():
        calls = [n for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, ast.Call)]
        prints = [n for n in calls if isinstance(n.func, ast.Name) and n.func.id == "print"]
        assert not prints or part_of(module) == "cli", module
