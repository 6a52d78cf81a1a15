"""Runs read back from their folders: statistics, tables, figures and the web page."""
