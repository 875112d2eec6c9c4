"""`estune compare`: methods x models x seeds on the same ground, with equal budgets, and what came of it."""
