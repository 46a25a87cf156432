"""The demo: meta-trains a byte-level Transformer to tell unseen languages apart from a few names of each."""
