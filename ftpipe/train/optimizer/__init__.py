"""Methods that take the optimizer step."""
