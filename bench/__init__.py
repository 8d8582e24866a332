"""Studies and benchmarks: ``python -m bench.NAME --help``."""
