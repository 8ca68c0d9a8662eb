"""Checkers: whether an answer is as good as a reference."""
