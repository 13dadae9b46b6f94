"""Configs: `base.py` explains every field; the others are short differences from it."""
