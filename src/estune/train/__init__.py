"""Training with evolution strategies: the loop, one step, evaluation."""
