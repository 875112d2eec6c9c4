"""Low-rank members: many of them in one forward pass of a transformers model."""
