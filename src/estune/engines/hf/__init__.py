"""The engine of transformers models in this process."""
