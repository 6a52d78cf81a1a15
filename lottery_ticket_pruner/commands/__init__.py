"""Commands of `lottery-ticket` that work on several runs, on their results or on saved models."""
