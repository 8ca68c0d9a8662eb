"""Suites: what a system is asked, item by item."""
