"""A linear recurrence along the tokens: `api` is what callers see, the other files are ways to run it."""
