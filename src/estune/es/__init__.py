"""The method: members, noise, fitness, update, and theta on the host; NumPy and numba only."""
