"""Low-rank members: many members share one forward pass of a transformers model."""
