"""Benchmarks against named peers: ratios from interleaved runs, written to results/bench/."""
