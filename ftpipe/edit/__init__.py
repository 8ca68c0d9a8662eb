"""Editing: an adapter's change turned into another one, without training."""
