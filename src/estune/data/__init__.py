"""Rows: datasets, the rows of each step, prompts, and the columns that reward functions receive."""
