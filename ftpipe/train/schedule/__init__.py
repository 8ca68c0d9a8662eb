"""Learning-rate schedules: the factor of the learning rate at a step."""
