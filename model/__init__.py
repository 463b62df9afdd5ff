"""The model on arrays alone: items, learner, user profile, ranker, encoder. Imports no other room."""

import os

import numba

# Of the kernels: the speed of level 3 in half the time to compile. Set here, for a sum's last bit depends on it, and
# the compiled kernels lie in one cache.
os.environ["NUMBA_OPT"] = "2"
numba.config.reload_config()
