"""Benchmarks: plan, measurement, results, scaling, report, monitor (notebook 10)."""
