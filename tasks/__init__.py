"""Prefect tasks: call the library, publish artifacts for the UI."""
