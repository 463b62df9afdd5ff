"""Benchmarks: each module has `run(args) -> dict`; `python -m bench NAME` runs one and prints one JSON object last."""
