"""Keys, sealed values and files, password hashes and bearer tokens; nothing here reads settings."""
