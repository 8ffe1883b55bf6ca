"""Makes raw training data from the Python standard library of this machine, without a download.

The pretraining documents are its source files; the task is to write a function's docstring from its
signature. Files are split by a hash of their name, so that no held-out function is in a file that
is trained on.
"""

import ast
import hashlib
import json
import sysconfig
import warnings
from collections.abc import Iterator
from pathlib import Path

HELD_OUT_OF_100 = 10
_LEFT_OUT = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"}
_LONGEST_CODE = 40_000  # characters; tables such as those of the codecs would outweigh the rest
_SHORTEST_ANSWER, _LONGEST_ANSWER = 20, 200
_LONGEST_SIGNATURE = 100


def build_corpus(folder: Path) -> None:
    """Write the four raw files into `folder`, as JSON lines; one version of Python always gives the
    same files.
    """
    folder.mkdir(parents=True, exist_ok=True)
    library = Path(sysconfig.get_paths()["stdlib"])
    code: dict[bool, list[dict[str, str]]] = {False: [], True: []}
    task: dict[bool, list[dict[str, str]]] = {False: [], True: []}
    for path in sorted(_files(library)):
        name = path.relative_to(library)
        text = path.read_text(encoding="utf-8", errors="replace")
        held_out = _is_held_out(str(name))
        if text.strip() and len(text) <= _LONGEST_CODE:
            code[held_out].append({"text": text})
        task[held_out] += list(_tasks(text))
    paths = [folder / f"{n}.jsonl" for n in ("code", "code-held-out", "task", "task-held-out")]
    everything = (code[False], code[True], task[False], task[True])
    for path, records in zip(paths, everything, strict=True):
        lines = (json.dumps(record) + "\n" for record in records)
        path.write_text("".join(lines), encoding="utf-8")


def _files(folder: Path) -> Iterator[Path]:
    """The Python files in a folder and its subfolders, without installed packages, which can be
    gigabytes.
    """
    for entry in folder.iterdir():
        if entry.is_dir():
            if entry.name not in _LEFT_OUT:
                yield from _files(entry)
        elif entry.suffix == ".py":
            yield entry


def _is_held_out(name: str) -> bool:
    return int(hashlib.sha256(name.encode()).hexdigest(), 16) % 100 < HELD_OUT_OF_100


def _tasks(source: str) -> Iterator[dict[str, str]]:
    """A prompt with the signature, and the first paragraph of the docstring as the answer."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # old escapes in the library's own strings
        try:
            tree = ast.parse(source)
        except SyntaxError:  # files that are wrong on purpose, such as those of lib2to3
            return
    for node in ast.walk(tree):
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        answer = " ".join((ast.get_docstring(node) or "").split("\n\n")[0].split())
        signature = f"def {node.name}({ast.unparse(node.args)})"
        fits = _SHORTEST_ANSWER <= len(answer) <= _LONGEST_ANSWER
        if fits and len(signature) <= _LONGEST_SIGNATURE:
            yield {"prompt": f"What does this function do?\n{signature}", "response": answer}
