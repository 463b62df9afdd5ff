"""streams -> model, state, monitoring; those three import no other room; each heavy package has its one place."""

import ast
import subprocess
import sys
from pathlib import Path
from typing import Final

import pytest

ROOT: Final = Path(__file__).parent.parent
ROOMS: Final = ("streams", "model", "state", "monitoring")

# Only these modules may import the package.
PLACES: Final = {
    "faust": {"streams.app", "streams.agents", "streams.web"},
    "rocksdict": {"state.store"},
    "cryptography": {"state.sealing"},
    "torch": {"model.encoder", "model.lora"},
    "transformers": {"model.encoder", "model.lora"},
    "peft": {"model.lora"},
    "fastapi": {"streams.web", "streams.openapi"},
    "typer": {"streams.__main__", "streams.cli", "streams.cli_asking", "streams.cli_encoder"},
    "pydantic_settings": {"streams.settings"},
}


def _imports() -> dict[str, set[str]]:
    """{module: top-level packages that it imports}, of the product."""
    found = {}
    for room in ROOMS:
        for path in (ROOT / room).rglob("*.py"):
            tree = ast.parse(path.read_text(encoding="utf-8"))
            names = set()
            for node in ast.walk(tree):
                if isinstance(node, ast.Import):
                    names |= {alias.name.split(".")[0] for alias in node.names}
                elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
                    names.add(node.module.split(".")[0])
            found[".".join(path.relative_to(ROOT).with_suffix("").parts)] = names
    return found


def test_import_contracts_hold() -> None:
    done = subprocess.run(
        [str(Path(sys.executable).parent / "lint-imports"), "--no-cache"], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("package", PLACES)
def test_package_is_imported_in_its_place_only(package: str) -> None:
    importers = {module for module, names in _imports().items() if package in names}
    assert importers <= PLACES[package]


@pytest.mark.parametrize("command", ["--help", "settings"])
def test_command_line_starts_without_the_heavy_packages(command: str) -> None:
    """`--help` answers at once: what a command needs is loaded when it runs."""
    code = (
        "import sys\nfrom streams.__main__ import app\n"
        f"try: app([{command!r}])\nexcept SystemExit: pass\n"
        "heavy = {'faust', 'numba', 'torch', 'kafka', 'fastapi'} & sys.modules.keys()\n"
        "print(','.join(heavy), file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stderr.strip() == ""
