"""Tokens into fewer and back: `api` is what callers see, the other files are ways to run it."""
