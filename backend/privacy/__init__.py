"""The data map and what is derived from it: export, import, erasure, and which rows are due."""
