"""Generation backends: `base` says what one must do, `hf` drives any Hugging Face causal language model, `toy` none."""
