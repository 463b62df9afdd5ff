"""What every kernel has, whatever it computes: that is in the tests of the learner, the profile and the ranker."""

import numba
import numpy as np
from numba.core.dispatcher import Dispatcher

from bench import loops
from model import kernels


def test_kernels_that_kernels_call_are_inlined() -> None:
    """A copy outside its caller would be optimised, and so summed, in another way: docs/decisions.md, the last bit."""
    compiled = [kernel for kernel in vars(kernels).values() if isinstance(kernel, Dispatcher)]
    assert len(compiled) > 40 and numba.config.OPT == 2
    assert [k.py_func.__name__ for k in compiled if not k.targetoptions.get("forceinline")] == []


def _sums_and_writes(a, b, out):  # type: ignore[no-untyped-def]
    total = np.float32(0)
    for n in range(len(a)):
        total += a[n] * b[n]
        out[n] = a[n] * np.float32(2)
    return total


def _sums_then_writes(a, b, out):  # type: ignore[no-untyped-def]
    total = np.float32(0)
    for n in range(len(a)):
        total += a[n] * b[n]
    for n in range(len(a)):
        out[n] = a[n] * np.float32(2)
    return total


def test_a_sum_whose_order_depends_on_where_arrays_lie_is_found() -> None:
    found = []
    for body in (_sums_and_writes, _sums_then_writes):
        kernel = numba.njit(fastmath=kernels.OPTIONS["fastmath"])(body)
        kernel(*np.zeros((3, 40), np.float32))
        found.append(loops.uncertain("".join(kernel.inspect_llvm().values())))
    assert found[0] and not found[1]
