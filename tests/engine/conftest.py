"""What all tests of engines share: one thread, and the answers of transformers to compare with."""

import pytest
import torch

from llava_ray.types import Prompt

torch.set_num_threads(1)  # the models are tiny, and threads that wait for each other are slow


@pytest.fixture(scope="module")
def generate():
    """What transformers answers, one prompt at a time."""
    # Not at the top: this imports Triton, which test_gpu_attention first has to set up.
    from llava_ray.model.loading import load_model
    from tests.support.tiny_checkpoint import tiny_model

    core = load_model(tiny_model(), dtype="float32", device="cpu")

    def generate(prompt: Prompt) -> str:
        inputs = core.encode(prompt.text, prompt.images)
        ids = core.model.generate(
            **inputs, max_new_tokens=prompt.sampling.max_tokens, do_sample=False
        )
        new = ids[0, inputs["input_ids"].shape[1] :]
        return core.tokenizer.decode(new, skip_special_tokens=True)

    return generate
