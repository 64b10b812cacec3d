"""Installs conj: all there is to say stands in pyproject.toml. scripts/setup.sh installs it with locked versions."""

from setuptools import setup

setup()
