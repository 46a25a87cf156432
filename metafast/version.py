"""The version of metafast."""

__version__ = "0.1.0"
