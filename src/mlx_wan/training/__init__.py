"""Training: the world that clips are drawn from, the objective, the trainer."""
