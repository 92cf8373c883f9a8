"""Attention along a 2-D pattern: `api` is what callers see, the other files are ways to run it."""
