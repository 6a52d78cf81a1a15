"""Builds the distribution for tools that still look for a setup.py; pyproject.toml says it all."""

from setuptools import setup

setup()
