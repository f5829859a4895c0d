"""A hook that acts every so many steps, and a training run that takes it."""

# TODO: to be written, and executed by tests/test_docs.py.
