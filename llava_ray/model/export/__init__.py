"""Writing checkpoints: LLaVA's own format, transformers' (hf), projectors and deltas."""
