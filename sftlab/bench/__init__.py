"""Benchmarks: plan, measurement, results, scaling, projection, report, monitor (notebook 10)."""
