"""Structures, scans and pattern stores: everything that is read, simulated and kept. Not for models."""
