"""Benchmarks: ``python -m tests.bench``, see ``__main__``."""
