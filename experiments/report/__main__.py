"""`python -m experiments.report DIR [--output=FILE] [--baseline=ARM] [--figures]`: the report of a sweep."""

from .command import main

main()
