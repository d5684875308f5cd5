"""Commands that are no stage of a run: each is one function."""
