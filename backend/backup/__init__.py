"""Dump, compress, encrypt, digest, store, and back; encryption comes in as a function."""
