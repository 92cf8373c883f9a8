"""Attention among token sequences: `api` is what callers see, the other files are ways to run it."""
