"""Faults injected for real: broken files, killed processes, hostile input."""
