"""Merging: one adapter from several."""
