"""Benchmarks: cases are data, baselines run in the same process and turn, results are ratios."""
