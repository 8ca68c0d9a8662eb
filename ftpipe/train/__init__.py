"""Training: launch, loop, checkpoints, and the five slots that plug into the loop."""
