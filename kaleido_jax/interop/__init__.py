"""Weights in, weights out: other projects' names and layouts to ours and back."""
