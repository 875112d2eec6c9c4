"""The method: members, noise, fitness, update, and theta in host memory; NumPy and numba only."""
