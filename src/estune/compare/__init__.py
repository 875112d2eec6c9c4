"""`estune compare`: methods x models x seeds under equal conditions and equal budgets, measured and reported."""
