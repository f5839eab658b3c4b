"""transformer-playground: small decoder-only transformers, taken apart from the config."""

__version__ = "0.1.0"
