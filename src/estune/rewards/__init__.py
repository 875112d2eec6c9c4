"""Reward functions: TRL's contract, run in processes that can be killed."""
