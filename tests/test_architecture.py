"""What the contracts between rooms (pyproject.toml, import-linter) cannot say."""

import ast
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "bigmix"
MODULES = {path.relative_to(PACKAGE).with_suffix(""): path for path in PACKAGE.rglob("*.py")}
LARGE = 100  # lines from which on a module is tested by its room's tests, or stands below
MOST_FUNCTION_LINES = 60
MOST_LINES_OF_A_TRAIN_FILE = 450
MOST_LOOP_LINES = 70

# Modules that no test of their room imports, by the tests that run them.
COVERED_BY = {
    "cluster/test_supervisor.py": {"cluster/signals", "cluster/watchdog"},
    "commands/compare/findings/test_headline.py": {"commands/compare/findings/knowledge"},
    "commands/compare/findings/test_warnings.py": {"commands/compare/findings/warnings"},
    "commands/compare/test_compare.py": {
        "commands/compare/folders",
        "commands/compare/page",
        "commands/compare/summary",
        "commands/compare/charts/axes",
        "commands/compare/charts/curves",
    },
    "commands/compare/test_compare_sweep.py": {
        "commands/compare/charts/figure",
        "commands/compare/charts/frontier",
        "commands/compare/charts/law_chart",
        "commands/compare/charts/styles",
        "commands/compare/charts/svg",
    },
    "commands/plan/test_plan.py": {"commands/plan/command"},
    "commands/prepare/test_prepare.py": {
        "commands/prepare/command",
        "commands/prepare/picture",
        "commands/prepare/writer",
    },
    "commands/probe/test_behaviour.py": {"evaluation/tables"},
    "commands/probe/test_probe.py": {"commands/probe/command", "commands/probe/score"},
    "commands/remedies/test_average.py": {"commands/remedies/command"},
    "commands/remedies/test_chat_replay.py": {"commands/remedies/conversations"},
    "data/shards/test_storage.py": {"data/shards/transports"},
    "data/test_planning.py": {"data/planning", "recipe/shares"},
    "data/test_share_rules.py": {"train/share_control"},
    "evaluation/behaviour/test_measure.py": {"evaluation/behaviour/teacher_forcing"},
    "evaluation/tasks/test_runner.py": {"recipe/task"},
    "evaluation/test_evaluator.py": {
        "commands/evaluate",
        "evaluation/evaluator",
        "evaluation/standalone",
    },
    "loss/test_fused.py": {"loss/recompute"},
    "model/test_causal_lm.py": {"model/ds_config", "train/step"},
    "model/test_checks.py": {"data/batch"},
    "recipe/test_load.py": {"recipe/models", "recipe/sections"},
    "runs/test_checkpoints.py": {"model/zero_partitions", "runs/saver", "runs/state_file"},
    "system/test_docs.py": {"commands/quickstart/command", "recipe/document"},
    "system/test_exactness.py": {"cluster/collectives"},
    "system/test_recovery.py": {"train/recovery"},
    "system/test_run.py": {
        "commands/inspect",
        "train/evaluations",
        "train/export",
        "train/header",
        "train/loop",
        "train/run",
        "train/setup",
        "train/state",
        "train/step_metrics",
    },
    "system/test_sweep.py": {"recipe/sweep", "runs/layout"},
}


def imports_of(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0 and node.module, f"{path}: a relative import"
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def test_torch_distributed_is_imported_by_the_collectives_alone():
    users = {
        str(module)
        for module, path in MODULES.items()
        if any(f"{name}.".startswith("torch.distributed.") for name in imports_of(path))
    }
    assert users == {"cluster/collectives"}


def test_only_commands_print():
    for module, path in MODULES.items():
        calls = [
            node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call)
        ]
        prints = any(isinstance(call.func, ast.Name) and call.func.id == "print" for call in calls)
        assert not prints or module.parts[0] == "commands", module


def test_each_large_module_is_tested_in_its_room_or_listed():
    elsewhere = set().union(*COVERED_BY.values())
    for file in COVERED_BY:
        assert (ROOT / "tests" / file).is_file(), file
    for module, path in MODULES.items():
        if len(path.read_text().splitlines()) < LARGE or str(module) in elsewhere:
            continue
        name = "bigmix." + ".".join(module.parts)
        room = ROOT / "tests" / module.parent
        mirrored = room / f"test_{module.name}.py"
        importing = (test for test in room.rglob("test_*.py") if name in imports_of(test))
        assert mirrored.exists() or any(importing), module


def test_the_list_of_modules_that_are_tested_elsewhere_is_of_today():
    for module in set().union(*COVERED_BY.values()):
        assert Path(module) in MODULES, module


def definitions(*kinds: type[ast.stmt]) -> Iterator[tuple[Path, ast.stmt]]:
    for module, path in MODULES.items():
        tree = ast.parse(path.read_text())
        yield from ((module, node) for node in ast.walk(tree) if isinstance(node, kinds))


def num_lines(path: Path) -> int:
    return len(path.read_text().splitlines())


def test_a_class_name_means_one_class():
    places: dict[str, list[str]] = {}
    for module, node in definitions(ast.ClassDef):
        places.setdefault(node.name, []).append(str(module))
    assert {name: found for name, found in places.items() if len(found) > 1} == {}


def test_no_function_is_longer_than_two_screens():
    lengths = {
        f"{module}:{node.lineno} {node.name}": node.end_lineno - node.lineno + 1
        for module, node in definitions(ast.FunctionDef, ast.AsyncFunctionDef)
    }
    too_long = {name: lines for name, lines in lengths.items() if lines > MOST_FUNCTION_LINES}
    assert too_long == {}


def test_the_loop_is_on_one_screen():
    assert num_lines(PACKAGE / "train/loop.py") <= MOST_LOOP_LINES


def test_the_files_of_the_trainer_are_short():
    lengths = {path.name: num_lines(path) for path in (PACKAGE / "train").glob("*.py")}
    too_long = {n: lines for n, lines in lengths.items() if lines > MOST_LINES_OF_A_TRAIN_FILE}
    assert too_long == {}


def test_the_package_is_ten_rooms_on_five_ground_modules():
    rooms = "commands train evaluation model runs data recipe cluster text loss"
    ground = "errors.py files.py seeding.py terminal.py types.py"
    found = {path.name for path in PACKAGE.iterdir()} - {"__pycache__"}
    assert found == {*rooms.split(), *ground.split(), "__init__.py", "py.typed"}
    assert len(found) == 17
