"""A trained model reads and writes text."""
