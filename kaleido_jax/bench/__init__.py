"""Measurements: each module measures one part and gives a dictionary fit for one JSON line."""

from __future__ import annotations
