"""Checks that are too long for the tests: each says what it compared and what differs."""
