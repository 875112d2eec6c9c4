"""The engine for transformers models in this process."""
