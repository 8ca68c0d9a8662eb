"""Tuning: which settings to try next."""
