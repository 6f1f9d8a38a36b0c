"""Evaluation: benchmarks, comparison of two policies, and planning traits."""
