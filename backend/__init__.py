"""Holdfast: keeps people's data safely, proves it, and lets go of it when it must."""

__version__ = "0.1.0"
