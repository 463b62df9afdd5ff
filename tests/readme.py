"""The examples of the README, to be run as they stand there."""

import os
import re
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Final

README: Final = Path(__file__).parent.parent / "README.md"
BLOCK: Final = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
EXAMPLE_S_MAX: Final = 60


def example(language: str, containing: str, changes: Mapping[str, str]) -> str:
    """The one block of this language with these words, its addresses and positions changed to the test's own."""
    (found,) = (
        b for name, b in BLOCK.findall(README.read_text(encoding="utf-8")) if name == language and containing in b
    )
    for written, meant in changes.items():
        assert written in found, f"{written} is not in the README's example"
        found = found.replace(written, meant)
    return str(found)


def run_shell(block: str, path: str = "") -> str:
    """What the block prints under bash, with a folder before the PATH."""
    env = {**os.environ, "PATH": f"{path}:{os.environ['PATH']}", "no_proxy": "127.0.0.1"}
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", block], capture_output=True, text=True, env=env, timeout=EXAMPLE_S_MAX
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout
