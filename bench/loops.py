"""Looks in the compiled kernels for sums of floats whose order depends on where arrays lie; there must be none.

A loop that writes is compiled twice: lanes side by side, and one by one. LLVM lets the loop find out which of them it
may run (`vector.memcheck`): where two arrays lie so close that one's lanes could overlap the other's, it is the second.
In all else that the kernels do the two give the same bits (`kernels.OPTIONS`), but a sum comes in another order.
"""

import argparse
import os
import re
import tempfile
from typing import Any, Final

LABEL: Final = re.compile(r"^([\w.$-]+):", re.MULTILINE)
NEXT: Final = re.compile(r"label %([\w.$-]+)")
LANES: Final = re.compile(r"vector\.(?!memcheck)|vec\.epilog|middle\.block|pred\.")
SUMS: Final = re.compile(r"= phi [a-z ]*<\d+ x (?:float|double)>")  # in each lane


def run(arguments: list[str]) -> dict[str, Any]:
    """`python -m bench loops`: compiles every kernel of learner and ranker anew (two minutes)."""
    argparse.ArgumentParser(prog="python -m bench loops").parse_args(arguments)
    with tempfile.TemporaryDirectory() as cache:  # what comes from the cache is machine code alone
        os.environ["NUMBA_CACHE_DIR"] = cache
        from model import kernels, learner, ranker

        learner.warm_up()
        ranker.warm_up(learner.Learner().matrix)
        told = {name: k.inspect_llvm() for name, k in vars(kernels).items() if getattr(k, "signatures", None)}
    checks = sum(llvm.count("\nvector.memcheck") for each in told.values() for llvm in each.values())
    found = {name: sums for name, each in told.items() if (sums := uncertain("".join(each.values())))}
    if found:
        raise SystemExit(f"sums that depend on where arrays lie: {found}")
    return {"kernels": len(told), "loops_that_look": checks, "uncertain_sums": 0}


def uncertain(llvm: str) -> list[str]:
    """The `vector.memcheck` before each such loop in optimised LLVM text."""
    return [check for function in llvm.split("\ndefine ")[1:] for check in _uncertain_in(function)]


def _uncertain_in(function: str) -> list[str]:
    labels = list(LABEL.finditer(function))
    ends = [label.start() for label in labels[1:]] + [len(function)]
    blocks = {label[1]: function[label.end() : end] for label, end in zip(labels, ends, strict=True)}
    checks = [name for name in blocks if name.startswith("vector.memcheck")]
    return [name for name in checks if any(SUMS.search(blocks[block]) for block in _lanes_after(blocks, name))]


def _lanes_after(blocks: dict[str, str], check: str) -> set[str]:
    """The check's block and those of its loop in lanes."""
    seen: set[str] = set()
    ahead = [check]
    while ahead:
        name = ahead.pop()
        seen.add(name)
        ahead += [n for n in NEXT.findall(blocks[name]) if n in blocks and n not in seen and LANES.match(n)]
    return seen
