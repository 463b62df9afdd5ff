"""The house style, as far as a program can see it."""

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import pytest

ROOT: Final = Path(__file__).parent.parent
ROOMS: Final = ("streams", "model", "state", "monitoring")
FOLDERS: Final = (*ROOMS, "headwater", "bench", "tests")
LINE_CHARS_MAX: Final = 120
FUNCTION_LINES_MAX: Final = 70
PRINTING: Final = ("streams/__main__.py", "streams/cli.py", "streams/cli_asking.py", "streams/events.py")
WALL_CLOCKS: Final = ("time.time", "datetime.now", "datetime.utcnow", "datetime.today", "time.time_ns")
UNFINISHED: Final = re.compile(
    r"\b(" + "|".join(("TO" + "DO", "FIX" + "ME", "X" + "XX", "NotImplemented" + "Error")) + r")\b"
)
SOURCES: Final = sorted(path for folder in FOLDERS for path in (ROOT / folder).rglob("*.py"))


def _name(path: Path) -> str:
    return str(path.relative_to(ROOT))


def _is_in(path: Path, *folders: str) -> bool:
    return path.relative_to(ROOT).parts[0] in folders


def _calls(tree: ast.AST) -> Iterator[tuple[str, int]]:
    """(dotted name of what is called, line)."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            yield ast.unparse(node.func), node.lineno


@pytest.mark.parametrize("path", SOURCES, ids=_name)
def test_file_keeps_the_house_style(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    tree = ast.parse(text)
    assert list(_faults(path, text, tree)) == []


def _faults(path: Path, text: str, tree: ast.Module) -> Iterator[str]:
    for number, line in enumerate(text.splitlines(), 1):
        if len(line) > LINE_CHARS_MAX:
            yield f"{number}: {len(line)} characters in a line, {LINE_CHARS_MAX} at most"
        if UNFINISHED.search(line):
            yield f"{number}: unfinished: {line.strip()}"
    if not ast.get_docstring(tree):
        yield "1: a module says what it is for"
    may_read = _may_read_environment(path)
    set_here = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Subscript) and _is_set(node)}
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            lines = (node.end_lineno or 0) - node.lineno + 1
            if lines > FUNCTION_LINES_MAX:
                yield f"{node.lineno}: {node.name} has {lines} lines, {FUNCTION_LINES_MAX} at most"
        if isinstance(node, ast.Attribute) and _is_environment(node) and not (id(node) in set_here or may_read):
            yield f"{node.lineno}: only streams/settings.py reads the environment"
        if isinstance(node, ast.ExceptHandler) and _swallows_all(node):
            yield f"{node.lineno}: every failure is swallowed here"
    yield from _call_faults(path, tree)


def _is_environment(node: ast.Attribute) -> bool:
    return ast.unparse(node) == "os.environ"


def _is_set(node: ast.Subscript) -> bool:
    """Whether it is assigned to: what libraries are told is no setting that is read."""
    return isinstance(node.ctx, ast.Store)


def _may_read_environment(path: Path) -> bool:
    return not _is_in(path, *ROOMS) or _name(path) == "streams/settings.py"


def _swallows_all(handler: ast.ExceptHandler) -> bool:
    catches_all = handler.type is None or ast.unparse(handler.type) in ("Exception", "BaseException")
    return catches_all and [type(part) for part in handler.body] == [ast.Pass]


def _call_faults(path: Path, tree: ast.Module) -> Iterator[str]:
    for name, line in _calls(tree):
        if name in WALL_CLOCKS and _is_in(path, *ROOMS) and _name(path) != "streams/__main__.py":
            yield f"{line}: {name}() outside streams/__main__.py: take `now` as an argument"
        if name == "print" and _is_in(path, *ROOMS) and _name(path) not in PRINTING:
            yield f"{line}: print() outside the command line"
        if name in ("time.sleep", "sleep") and _is_in(path, "tests"):
            yield f"{line}: a test waits for a condition, not for luck"
        if name.endswith(("pickle.dumps", "pickle.loads", "pickle.dump", "pickle.load")):
            yield f"{line}: no pickle in what is kept"


@pytest.mark.parametrize("folder", ROOMS)
def test_room_has_no_catch_all_module(folder: str) -> None:
    names = {path.stem for path in (ROOT / folder).rglob("*.py")}
    assert not names & {"utils", "util", "helpers", "common", "misc", "manager"}


@pytest.mark.parametrize(
    "command", [("ruff", "check"), ("ruff", "format", "--check"), ("mypy",)], ids=["ruff", "format", "mypy"]
)
def test_tool_finds_nothing(command: tuple[str, ...]) -> None:
    done = subprocess.run([sys.executable, "-m", *command], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_every_version_is_pinned() -> None:
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pins = [line for line in lines if line and not line.startswith("#")]
    assert [pin for pin in pins if not re.fullmatch(r"[A-Za-z0-9._-]+==[A-Za-z0-9._+!-]+", pin)] == []
