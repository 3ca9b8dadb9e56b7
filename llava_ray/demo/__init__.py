"""The embedded model: a very small LLaVA, its scenes and its questions.

Its recipe is in jobs/embedded_model. Importing this package imports neither torch nor transformers;
`evaluate` does.
"""

import random
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from PIL import Image

__all__ = ["KNOWS", "MODEL_DIR", "make_example"]

MODEL_DIR = Path(__file__).parent / "model"
KNOWS = (
    "This very small model knows drawn scenes of up to five objects: coloured shapes, sixty "
    "everyday things (animals, food, vehicles, tools) and printed numbers from 0 to 99. It says "
    "what there is and where, how many, what colour, which is larger, what number is written, and "
    "describes the scene. It is sometimes wrong, and knows nothing else, and nothing about "
    "photographs."
)
EXAMPLE_SCALE = 3  # drawn larger than the model sees, for people to look at


def make_example(seed: int, *, num_questions: int = 4) -> tuple["Image.Image", list[str]]:
    """A new scene, 432 pixels a side, and questions that fit it, the same for the same seed."""
    from llava_ray.demo import questions, scenes

    rng = random.Random(f"example {seed}")
    scene = scenes.make_scene(rng, num_items=rng.randint(3, 5))
    asker = questions.Asker(scene, rng)
    kinds = [kind for kind in questions.WEIGHTS if kind not in ("description", "absent", "talk")]
    asked = (questions.ask(kind, asker) for kind in rng.sample(kinds, len(kinds)))
    texts = [question.text for question in asked if question][: num_questions - 1]
    return scenes.draw(scene, scale=EXAMPLE_SCALE), ["Describe the picture.", *texts]
