"""Writes the inputs of a tiny training run: raw data, a language model and a vision tower.

`python -m jobs.embedded_model raw` calls this. With the recipes tiny_* one can build, convert,
pretrain, fine-tune and evaluate a LLaVA on a CPU.

    images/             drawn scenes
    captions.json       a description of each, in LLaVA's format: for pre-training
    conversations.json  questions and answers about each, likewise: for fine-tuning
    llm/                the embedded language model by itself
    tower/              its vision tower
"""

import json
import random
import shutil
from pathlib import Path
from typing import Any

from llava_ray.demo import MODEL_DIR, questions, scenes

NUM_TURNS = 6
_WEIGHTS = {kind: weight for kind, weight in questions.WEIGHTS.items() if kind != "talk"}


def write_raw(folder: Path, *, num_scenes: int, seed: int = 0) -> None:
    """Write the folder; its content depends only on the arguments.

    The scenes are training scenes, which `llava-ray demo evaluate` never uses.
    """
    images = folder / "images"
    images.mkdir(parents=True, exist_ok=True)
    captions, conversations = [], []
    for index in range(num_scenes):
        rng = random.Random(f"raw {seed} {index}")
        scene = scenes.make_scene(rng)
        name = f"{index:06}.png"
        scenes.draw(scene).save(images / name)
        turns = questions.make_conversation(rng, [scene], num_turns=NUM_TURNS, weights=_WEIGHTS)
        asked = [(turn.question, turn.answer) for turn in turns]
        captions.append(_write_row(name, [("Describe the picture.", questions.describe(scene))]))
        conversations.append(_write_row(name, asked))
    (folder / "captions.json").write_text(json.dumps(captions))
    (folder / "conversations.json").write_text(json.dumps(conversations))
    write_parts(folder)


def write_parts(folder: Path) -> None:
    """Write the embedded model's language model and tower, each as a model of its own."""
    from transformers import AutoTokenizer, LlamaForCausalLM

    from llava_ray.model.loading import load_model
    from llava_ray.model.transformers_output import no_progress_bars

    model: Any = load_model(MODEL_DIR, device="cpu", dtype="bfloat16").model
    language_model = LlamaForCausalLM(model.config.text_config).bfloat16()
    language_model.model.load_state_dict(model.model.language_model.state_dict())
    language_model.lm_head.load_state_dict(model.lm_head.state_dict())
    with no_progress_bars():
        language_model.save_pretrained(folder / "llm")
        model.model.vision_tower.save_pretrained(folder / "tower")
    AutoTokenizer.from_pretrained(MODEL_DIR).save_pretrained(folder / "llm")
    shutil.copy(MODEL_DIR / "chat_template.jinja", folder / "llm")
    shutil.copy(MODEL_DIR / "preprocessor_config.json", folder / "tower")


def _write_row(name: str, turns: list[tuple[str, str]]) -> dict[str, Any]:
    said = []
    for number, (question, answer) in enumerate(turns):
        opening = "<image>\n" if number == 0 else ""
        said.append({"from": "human", "value": opening + question})
        said.append({"from": "gpt", "value": answer})
    return {"id": Path(name).stem, "image": name, "conversations": said}
