"""The commands of `lottery-ticket` that work on many runs, on their results or on saved models."""
