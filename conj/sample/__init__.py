"""Stages 2 and 3, and judging: all that asks a model for text."""
