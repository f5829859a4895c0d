"""The text that comes with the package."""
