"""Methods that choose rows up to a budget."""
