"""Checks that take too long for the tests; each prints what it compared and what differs."""
