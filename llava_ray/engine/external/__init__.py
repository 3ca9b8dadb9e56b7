"""vLLM and SGLang as engines, each in a child process that runs in an environment of its own."""
