"""The best partner of each token: `api` is what callers see, the other files are ways to run it."""
