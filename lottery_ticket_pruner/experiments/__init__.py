"""Experiments of the papers: data sets, networks, configurations, runs and reports.

Requires the extra of the command line: `pip install "lottery-ticket-pruner[cli]"`.
"""
