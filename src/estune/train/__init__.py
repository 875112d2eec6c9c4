"""Training with evolution strategies: the loop, one step, and evaluation."""
