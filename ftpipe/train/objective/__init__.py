"""Methods that say what is minimised: the loss of a micro-batch."""
