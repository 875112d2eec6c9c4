"""Engines in Ray's workers, each with a replica of theta; seeds, scalars and token ids travel, never weights."""
