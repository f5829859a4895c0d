"""A column of one's own in the report's table, and its value for a finished run."""

# TODO: to be written, and executed by tests/test_docs.py.
