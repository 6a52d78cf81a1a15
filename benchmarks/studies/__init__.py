"""Experiments on accuracy, whose tables are in docs/results.md."""
