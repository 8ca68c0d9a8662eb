"""Prefect flows: a loop over a run's stages."""
