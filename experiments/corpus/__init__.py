"""The text of long runs: 11 labelled domains, fetched from package registries by their ordinary clients."""
