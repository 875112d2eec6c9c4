"""Rows: reading datasets, making prompts, and the columns that rewards are given."""
