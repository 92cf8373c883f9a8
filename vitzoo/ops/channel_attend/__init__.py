"""Softmax attention among channels: `api` is what callers see, the other files are ways to run it."""
