"""Attention to chosen regions of a map: `api` is what callers see, the other files are ways to run it."""
