"""Benchmarks: measurement, results, scaling, report, monitor (notebook 10)."""
