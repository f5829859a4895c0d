"""`python -m experiments.report DIR [--output=FILE] [--baseline=ARM] [--figures]`: a sweep's page."""

from .command import main

main()
