"""The tests of Headwater, with one thread a matrix library, as in its workers: sums, and so digests, depend on it."""

from streams.settings import one_thread_each

one_thread_each()
