"""The tasks for the evaluation harness that come with the package."""
