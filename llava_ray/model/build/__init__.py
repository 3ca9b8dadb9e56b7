"""A new, untrained LLaVA from a language model and a vision tower."""
