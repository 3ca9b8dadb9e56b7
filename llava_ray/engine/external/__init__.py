"""vLLM and SGLang, each in a process of its own and in the Python of its own environment."""
