"""Readers of the benchmarks' question and annotation files: each returns `Question` records."""
