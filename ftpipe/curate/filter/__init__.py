"""Methods that keep or drop each row on its own merits."""
