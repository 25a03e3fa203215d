"""The suites of `benchmark.py`, and how they measure."""
