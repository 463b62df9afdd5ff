"""Where Prometheus' own checker is: `make test` puts it into the environment."""

import shutil
import sys
from pathlib import Path


def promtool() -> str:
    """Its path. Fails the test where it is missing."""
    beside = Path(sys.executable).parent / "promtool"
    found = str(beside) if beside.exists() else shutil.which("promtool")
    assert found, "promtool is not here: ./setup.sh test fetches it"
    return found
