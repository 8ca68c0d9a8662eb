"""Methods that decide when each row is seen."""
