"""Connections to other libraries; each is imported by name, none with the package."""
