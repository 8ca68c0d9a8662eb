"""Evaluation: suites that score systems item by item, paired statistics over the items, diagnostics, and the gate's rules."""
