"""The papers' experiments: data sets, networks, configurations, runs and reports.

Needs the extra of the command line: `pip install "lottery-ticket-pruner[cli]"`.
"""
