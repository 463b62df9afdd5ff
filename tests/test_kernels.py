"""What every kernel has, whatever it computes: that is in the tests of the learner, the profile and the ranker."""

import numba
from numba.core.dispatcher import Dispatcher

from model import kernels


def test_kernels_that_kernels_call_are_inlined() -> None:
    """A copy outside its caller would be optimised, and so summed, in another way: docs/decisions.md, the last bit."""
    compiled = [kernel for kernel in vars(kernels).values() if isinstance(kernel, Dispatcher)]
    assert len(compiled) > 40 and numba.config.OPT == 2
    assert [k.py_func.__name__ for k in compiled if not k.targetoptions.get("forceinline")] == []
