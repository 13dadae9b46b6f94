"""Evaluation: pictures of a model, or ideal ones, measured against the data and their latents."""
