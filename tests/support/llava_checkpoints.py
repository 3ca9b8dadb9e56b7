"""Tiny checkpoints in LLaVA's own format, and a slow reference that computes them by hand.

`Original.write` writes the files as LLaVA's trainer names them. `Original.logits` never touches
llava_ray: it takes transformers' plain tower and language model, prepares images with Pillow and
splices features between embeddings, as LLaVA's code does it.
"""

import json
import math
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, CLIPVisionConfig, SiglipVisionConfig
from transformers.models.auto import CONFIG_MAPPING, AutoModel

from llava_ray.model.build.random_model import build_byte_tokenizer

TILE, PATCH = 28, 7
SIDE = TILE // PATCH
HIDDEN, TOWER_HIDDEN = 32, 16
MEAN, STD = [0.48, 0.46, 0.41], [0.27, 0.26, 0.28]
PINPOINTS = [(28, 56), (56, 28), (56, 56), (84, 28)]  # (width, height)
TRUNK = {"mpt": "transformer"}

TEXT = {
    "llama": {"num_key_value_heads": 2, "rms_norm_eps": 1e-6},
    "mistral": {"num_key_value_heads": 2, "rms_norm_eps": 1e-6, "sliding_window": None},
    "qwen2": {"num_key_value_heads": 2},
    "mpt": {},
}


@dataclass
class Original:
    """One checkpoint; the fields are those of config.json without `mm_`."""

    text: str = "llama"
    tower: str = "clip"
    projector: str = "mlp2x_gelu"
    aspect: str = "square"
    merge: str = "flat"
    layer: int = -2
    feature: str = "patch"
    start_end: bool = False
    extra: dict[str, Any] = field(default_factory=dict)

    @cached_property
    def tokenizer(self) -> Any:
        tokenizer = build_byte_tokenizer(context_length=512)
        if self.start_end:
            tokenizer.add_tokens(["<im_start>", "<im_end>"], special_tokens=True)
        return tokenizer

    @property
    def vocab_size(self) -> int:
        """As many rows as needed, and none for `<image>` where it can be left out."""
        return len(self.tokenizer) - (not self.start_end)

    @cached_property
    def lm(self) -> Any:
        torch.manual_seed(1)
        sizes: dict[str, Any] = {
            "hidden_size": HIDDEN,
            "intermediate_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "max_position_embeddings": 512,
        }
        if self.text == "mpt":
            sizes = {"d_model": HIDDEN, "n_heads": 4, "n_layers": 2, "max_seq_len": 512}
        config = CONFIG_MAPPING[self.text](
            vocab_size=self.vocab_size,
            initializer_range=0.2,
            bos_token_id=self.tokenizer.bos_token_id,
            eos_token_id=self.tokenizer.eos_token_id,
            tie_word_embeddings=self.text == "mpt",
            **sizes,
            **TEXT[self.text],
        )
        return AutoModelForCausalLM.from_config(config).float().eval()

    @cached_property
    def vision(self) -> Any:
        torch.manual_seed(2)
        sizes: dict[str, Any] = {
            "hidden_size": self.tower_hidden,
            "intermediate_size": 32,
            "num_hidden_layers": 3,
            "num_attention_heads": 2,
            "image_size": TILE,
            "patch_size": PATCH,
        }
        if self.tower == "clip":
            config: Any = CLIPVisionConfig(**sizes)
        else:
            config = SiglipVisionConfig(**sizes, vision_use_head=False)
        model = AutoModel.from_config(config).float().eval()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.normal_(0, 0.3)
        return model

    @cached_property
    def linears(self) -> list[torch.nn.Linear]:
        torch.manual_seed(3)
        counts = {"identity": 0, "linear": 1, "mlp2x_gelu": 2, "mlp3x_gelu": 3}
        count = counts[self.projector]
        return [torch.nn.Linear(HIDDEN if i else TOWER_HIDDEN, HIDDEN) for i in range(count)]

    @cached_property
    def newline(self) -> torch.Tensor:
        return torch.randn(HIDDEN, generator=torch.Generator().manual_seed(4))

    @property
    def is_next(self) -> bool:
        """Whether LLaVA-NeXT's code trained it."""
        return self.text == "qwen2" or "mm_newline_position" in self.extra

    @property
    def tower_hidden(self) -> int:
        return HIDDEN if self.projector == "identity" else TOWER_HIDDEN

    @property
    def trunk(self) -> str:
        return TRUNK.get(self.text, "model")

    def config(self) -> dict[str, Any]:
        found = self.lm.config.to_dict()
        return found | {
            "model_type": f"llava_{self.text}".replace("qwen2", "qwen"),
            "architectures": ["LlavaForCausalLM"],
            "mm_vision_tower": "the-tower",
            "mm_hidden_size": self.tower_hidden,
            "mm_projector_type": self.projector,
            "mm_vision_select_layer": self.layer,
            "mm_vision_select_feature": self.feature,
            "mm_patch_merge_type": self.merge,
            "mm_use_im_start_end": self.start_end,
            "mm_use_im_patch_token": False,
            "image_aspect_ratio": self.aspect,
            "image_grid_pinpoints": PINPOINTS if self.aspect == "anyres" else None,
            "use_mm_proj": True,
            **self.extra,
        }

    def projector_tensors(self) -> dict[str, torch.Tensor]:
        tensors = {}
        for i, linear in enumerate(self.linears):
            number = "" if self.projector == "linear" else f"{2 * i}."
            for name, tensor in linear.state_dict().items():
                tensors[f"{self.trunk}.mm_projector.{number}{name}"] = tensor
        if "unpad" in self.merge:
            tensors[f"{self.trunk}.image_newline"] = self.newline
        return tensors

    def tower_tensors(self, prefix: str = "") -> dict[str, torch.Tensor]:
        tensors = self.vision.state_dict().items()
        return {f"{prefix}vision_model.{name}": tensor for name, tensor in tensors}

    def write(self, folder: Path, *, tower_inside: bool = True) -> Path:
        """Write a whole checkpoint and, beside it, its tower."""
        tensors = self.lm.state_dict() | self.projector_tensors()
        if tower_inside:
            tensors |= self.tower_tensors(f"{self.trunk}.vision_tower.vision_tower.")
        if self.text == "mpt":
            del tensors["lm_head.weight"]
        write_tensors(folder, tensors)
        self.write_config(folder)
        self.tokenizer.save_pretrained(folder)
        self.write_tower(folder.parent / "the-tower", weights=not tower_inside)
        return folder

    def write_config(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "config.json").write_text(json.dumps(self.config()))

    def write_lm(self, folder: Path) -> Path:
        """Write the language model alone, as its own checkpoint."""
        write_tensors(folder, self.lm.state_dict())
        self.lm.config.save_pretrained(folder)
        self.tokenizer.save_pretrained(folder)
        return folder

    def write_tower(self, folder: Path, *, weights: bool = True) -> Path:
        folder.mkdir(parents=True, exist_ok=True)
        self.vision.config.save_pretrained(folder)
        if weights:
            write_tensors(folder, self.tower_tensors())
        size: dict[str, Any] = {"size": {"height": TILE, "width": TILE}}
        if self.tower == "clip":
            size = {"size": TILE, "do_center_crop": True, "crop_size": TILE}
        settings = {
            "image_processor_type": f"{self.tower.upper()}ImageProcessor",
            "do_resize": True,
            "do_normalize": True,
            "do_rescale": True,
            "rescale_factor": 1 / 255,
            "resample": 3,
            "image_mean": MEAN,
            "image_std": STD,
            **size,
        }
        (folder / "preprocessor_config.json").write_text(json.dumps(settings))
        return folder

    # The reference

    def ids(self, prompt: str) -> list[list[int]]:
        """Ids of each piece between images; only the first keeps its beginning of sequence."""
        if self.start_end:
            prompt = prompt.replace("<image>", "<im_start><image><im_end>")
        pieces = [self.tokenizer(piece).input_ids for piece in prompt.split("<image>")]
        return [pieces[0], *(piece[1:] for piece in pieces[1:])]

    @torch.inference_mode()
    def logits(self, prompt: str, images: list[Image.Image]) -> torch.Tensor:
        embed = self.lm.get_input_embeddings()
        parts: list[torch.Tensor] = []
        for i, ids in enumerate(self.ids(prompt)):
            if i:
                parts.append(self.features(images[i - 1]))
            parts.append(embed(torch.tensor(ids, dtype=torch.long)))
        return self.lm(inputs_embeds=torch.cat(parts)[None]).logits[0]

    def features(self, image: Image.Image) -> torch.Tensor:
        tiles = torch.stack([normalize(tile) for tile in self.tiles(image)])
        states = self.vision(tiles, output_hidden_states=True).hidden_states[self.layer]
        if self.feature == "patch" and self.tower == "clip":
            states = states[:, 1:]
        for i, linear in enumerate(self.linears):
            states = linear(torch.nn.functional.gelu(states) if i else states)
        if self.aspect != "anyres" or self.merge == "flat":
            flat = states.flatten(0, 1)
            has_newline = self.is_next and "unpad" in self.merge
            return torch.cat([flat, self.newline[None]]) if has_newline else flat
        width, height = choose(image.size)
        rows = [
            torch.cat(
                [
                    states[1 + r // SIDE * (width // TILE) + c // SIDE][r % SIDE * SIDE + c % SIDE]
                    for c in range(width // PATCH)
                ]
            ).view(-1, HIDDEN)
            for r in range(height // PATCH)
        ]
        if self.merge == "spatial_unpad":
            rows = crop(rows, image.size)
            rows = [torch.cat([row, self.newline[None]]) for row in rows]
        return torch.cat([states[0], *rows])

    def tiles(self, image: Image.Image) -> list[Image.Image]:
        if self.aspect == "anyres":
            width, height = choose(image.size)
            scale = min(width / image.width, height / image.height)
            if width / image.width < height / image.height:
                size = (width, min(math.ceil(image.height * scale), height))
            else:
                size = (min(math.ceil(image.width * scale), width), height)
            canvas = Image.new("RGB", (width, height))
            canvas.paste(image.resize(size), ((width - size[0]) // 2, (height - size[1]) // 2))
            boxes = [(x, y) for y in range(0, height, TILE) for x in range(0, width, TILE)]
            whole = image.resize((TILE, TILE))
            return [whole, *(canvas.crop((x, y, x + TILE, y + TILE)) for x, y in boxes)]
        if self.aspect == "pad":
            side = max(image.size)
            canvas = Image.new("RGB", (side, side), tuple(int(255 * mean) for mean in MEAN))
            canvas.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
            image = canvas
        if self.tower == "siglip":
            return [image.resize((TILE, TILE), Image.Resampling.BICUBIC)]
        short = min(image.size)
        size = (int(TILE * image.width / short), int(TILE * image.height / short))
        image = image.resize(size, Image.Resampling.BICUBIC)
        left, top = (size[0] - TILE) // 2, (size[1] - TILE) // 2
        return [image.crop((left, top, left + TILE, top + TILE))]


def normalize(tile: Image.Image) -> torch.Tensor:
    pixels = (np.asarray(tile, dtype=np.float32) / 255 - np.array(MEAN)) / np.array(STD)
    return torch.tensor(pixels, dtype=torch.float32).permute(2, 0, 1)


def choose(size: tuple[int, int]) -> tuple[int, int]:
    """The (width, height) that shows most of the image and then wastes least."""

    def rank(candidate: tuple[int, int]) -> tuple[int, int]:
        scale = min(candidate[0] / size[0], candidate[1] / size[1])
        shown = min(int(size[0] * scale) * int(size[1] * scale), size[0] * size[1])
        return shown, shown - candidate[0] * candidate[1]

    return max(PINPOINTS, key=rank)


def crop(rows: list[torch.Tensor], size: tuple[int, int]) -> list[torch.Tensor]:
    """Leave out the rows or columns of the grid that are padding."""
    height, width = len(rows), len(rows[0])
    if size[0] / size[1] > width / height:
        padding = (height - int(size[1] * (width / size[0]))) // 2
        return rows[padding : height - padding]
    padding = (width - int(size[0] * (height / size[1]))) // 2
    return [row[padding : width - padding] for row in rows]


def write_tensors(folder: Path, tensors: dict[str, torch.Tensor]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    copies = {name: tensor.detach().clone().contiguous() for name, tensor in tensors.items()}
    save_file(copies, folder / "model.safetensors")
