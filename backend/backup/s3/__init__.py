"""Backups in S3, and in whatever speaks its protocol."""
