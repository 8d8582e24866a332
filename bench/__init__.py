"""Benchmarks and measurements: ``python -m bench.NAME --help``."""
