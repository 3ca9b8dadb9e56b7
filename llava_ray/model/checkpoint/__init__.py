"""Reading checkpoints: where one is, what its files say it is, and its tensors."""
