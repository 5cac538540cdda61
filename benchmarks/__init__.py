"""Measured speed and agreement: pytest-benchmark files, and the programs that print README's tables."""
