"""A dispatcher of one's own, registered under a name, and a config that uses it."""

# TODO: to be written, and executed by tests/test_docs.py.
