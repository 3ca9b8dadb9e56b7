"""How a step is computed: tensors, kernels, the key-value cache and sampling."""
