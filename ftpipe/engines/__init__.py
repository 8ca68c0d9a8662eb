"""Where the work of steps is done: on this machine, or on many."""
