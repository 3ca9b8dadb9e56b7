"""The multimodal core: weights in, a model and its processor out."""
