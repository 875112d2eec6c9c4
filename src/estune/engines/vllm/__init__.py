"""The vLLM engine: theta in float32 beside a vLLM model, whose weights are written in place."""
