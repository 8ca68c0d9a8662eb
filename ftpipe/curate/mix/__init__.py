"""Methods that decide how often each row is seen."""
