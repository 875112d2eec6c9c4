"""Rows: datasets and their checks, the rows of each step, and prompts."""
