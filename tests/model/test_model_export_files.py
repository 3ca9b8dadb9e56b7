"""Export and the disk: tokenizers, deltas, and mistakes that leave nothing half-written."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from llava_ray.errors import ConfigError
from llava_ray.model.build.build import build_llava
from llava_ray.model.export.atomic_folder import parse_size, write_folder
from llava_ray.model.export.delta import make_delta
from llava_ray.model.export.export import export_model
from llava_ray.model.export.piecewise_tokenizer import agrees, join_pieces
from llava_ray.template import IMAGE_TOKEN
from tests.support.hf_checkpoints import write_published
from tests.support.llava_checkpoints import Original, write_tensors
from tests.support.partial_checkpoints import write_lora
from tests.support.reference_logits import assert_same_logits, load
from tests.support.tiny_checkpoint import make_image, tiny_model


def build_sentencepiece(prepend: str) -> Any:
    """Return a tokenizer with SentencePiece's ways: a space before the text, or every part of it.

    Args:
        prepend: "first" (Llama's `legacy=false`) or "always".
    """
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    pieces = ["<unk>", "<s>", "</s>", "▁", *map(chr, range(33, 127)), "\n", "▁a", "▁W", "Wh", "▁Wh"]
    merges = [("▁", "a"), ("▁", "W"), ("W", "h"), ("▁", "Wh")]
    tokenizer = Tokenizer(
        models.BPE({piece: i for i, piece in enumerate(pieces)}, merges, unk_token="<unk>")
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace("▁", prepend, split=False)
    tokenizer.decoder = decoders.Metaspace()
    tokenizer.add_special_tokens([AddedToken(t, special=True) for t in ("<unk>", "<s>", "</s>")])
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 1)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        clean_up_tokenization_spaces=False,
    )


@pytest.mark.parametrize("prepend", ["first", "always"])
def test_whole_prompts_get_the_ids_of_their_pieces(prepend: str, tmp_path: Path) -> None:
    pieces = build_sentencepiece(prepend)
    pieces.add_tokens([IMAGE_TOKEN], special_tokens=True)
    assert agrees(pieces, pieces) == (prepend == "always")
    assert agrees(join_pieces(pieces), pieces)
    original = Original()
    original.__dict__["tokenizer"] = build_sentencepiece(prepend)
    before = load(original.write(tmp_path / "model"))
    loaded = load(export_model(tmp_path / "model", tmp_path / "out", to="hf"))
    for text in ("USER: <image>\nWhat?", "a</s>a<image>What<image> a", "<s>What"):
        images = [image_of(text)] * text.count("<image>")
        found, expected = (c.encode(text, images)["input_ids"].tolist() for c in (loaded, before))
        assert found == expected
    assert agrees(loaded.tokenizer, before.tokenizer)  # also as it was read again


def test_prompts_that_were_read_whole_stay_whole_there_and_back(tmp_path: Path) -> None:
    folder, _ = write_published(tmp_path / "model", "llava")
    tokenizer = build_sentencepiece("first")
    tokenizer.add_tokens([IMAGE_TOKEN], special_tokens=True)
    tokenizer.save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    config["image_token_index"] = tokenizer.convert_tokens_to_ids(IMAGE_TOKEN)
    (folder / "config.json").write_text(json.dumps(config))
    original = export_model(folder, tmp_path / "original", to="original")
    again = export_model(original, tmp_path / "again", to="hf")
    text = "USER: <image>\nWhat?"
    ids = [load(f).encode(text, [image_of(text)])["input_ids"] for f in (folder, original, again)]
    assert ids[0].tolist() == ids[1].tolist() == ids[2].tolist()


def test_what_is_built_reads_the_same_in_every_format(tmp_path: Path) -> None:
    original = Original()
    original.__dict__["tokenizer"] = build_sentencepiece("first")
    parts = {"llm": original.write_lm(tmp_path / "lm")}
    parts["vision_tower"] = original.write_tower(tmp_path / "clip")
    folder = build_llava(tmp_path / "built", **parts)
    loaded, other = load(folder), load(export_model(folder, tmp_path / "out", to="original"))
    text = "USER: <image>\nWhat? <image> a"
    images = [image_of(text)] * 2
    assert loaded.encode(text, images)["input_ids"].tolist() == (
        other.encode(text, images)["input_ids"].tolist()
    )
    assert other.checkpoint.in_pieces


def image_of(text: str) -> Any:
    return make_image(len(text))


def write_pair(tmp_path: Path) -> tuple[Path, Path, Original]:
    """Write a language model with fewer words, and a LLaVA that was trained from it."""
    base = Original().write_lm(tmp_path / "base")
    below = load_file(base / "model.safetensors")
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        below[name] = below[name][:-5]
    write_tensors(base, below)
    trained = Original()
    with torch.no_grad():
        for name, parameter in trained.lm.named_parameters():
            parameter += 0.0 if "norm" in name else 0.1
    return base, trained.write(tmp_path / "trained"), trained


def test_a_delta_is_made_and_applied(tmp_path: Path) -> None:
    base, folder, trained = write_pair(tmp_path)
    delta = make_delta(folder, tmp_path / "delta", base=base, max_shard_size="20KB")
    held = {n: t for file in delta.glob("*.safetensors") for n, t in load_file(file).items()}
    whole, below = (load_file(f / "model.safetensors") for f in (folder, base))
    for name, tensor in whole.items():  # as LLaVA's apply_delta does it
        if name in below:
            held[name][: len(below[name])] += below[name]
        torch.testing.assert_close(held[name], tensor)
    assert len(list(delta.glob("*.safetensors"))) > 1
    assert_same_logits(load(delta, base=base), trained)
    applied = export_model(delta, tmp_path / "applied", to="original", base=base)
    assert_same_logits(load(applied), trained)


def test_a_delta_needs_the_language_model_that_was_trained(tmp_path: Path) -> None:
    base, folder, _ = write_pair(tmp_path)
    other = Original(text="qwen2").write_lm(tmp_path / "other")
    with pytest.raises(ConfigError, match="give the language model that it was trained from"):
        make_delta(folder, tmp_path / "delta", base=other)
    with pytest.raises(
        ConfigError, match="not a checkpoint with full weights in LLaVA's own format"
    ):
        make_delta(tiny_model(), tmp_path / "delta", base=base)
    assert not (tmp_path / "delta").exists()


def test_a_first_llava_is_written_anew_under_todays_name(tmp_path: Path) -> None:
    original = Original(projector="linear", start_end=True, extra={"model_type": "llama"})
    out = export_model(original.write(tmp_path / "v0"), tmp_path / "out")
    assert json.loads((out / "config.json").read_text())["model_type"] == "llava"
    assert_same_logits(load(out), original)


def list_all(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder of one's own, with something in it."""
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "letter.txt").write_text("dear")
    return tmp_path / "mine"


def test_a_folder_is_replaced_only_when_asked_and_only_a_checkpoint(folder: Path) -> None:
    with pytest.raises(ConfigError, match="is not empty: give a new folder, or --overwrite"):
        export_model(tiny_model(), folder)
    with pytest.raises(ConfigError, match=r"is not a checkpoint .* does not remove anything else"):
        export_model(tiny_model(), folder, overwrite=True)
    with pytest.raises(ConfigError, match="it is a file"):
        export_model(tiny_model(), folder / "letter.txt")
    assert list_all(folder.parent) == ["mine", "mine/letter.txt"]
    (folder / "config.json").write_text("{}")
    export_model(tiny_model(), folder, overwrite=True)
    assert "letter.txt" not in list_all(folder)
    load(folder)
    assert list_all(folder.parent)[0] == "mine"


def test_nothing_is_written_into_what_is_read(tmp_path: Path) -> None:
    source = Original().write(tmp_path / "here" / "model")
    before = list_all(tmp_path)
    for out in (source, source / "out", tmp_path / "here", tmp_path / "here" / "the-tower" / "x"):
        with pytest.raises(ConfigError, match=r"inside one another|not empty"):
            export_model(source, out)
        with pytest.raises(ConfigError, match=r"inside one another|is not a checkpoint"):
            export_model(source, out, overwrite=True)
    assert list_all(tmp_path) == before


def test_a_source_that_does_not_load_leaves_nothing(tmp_path: Path) -> None:
    source = Original().write(tmp_path / "model")
    weights = source / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(ConfigError, match=r"does not load: it has .* bytes .*; download it again"):
        export_model(source, tmp_path / "out")
    with pytest.raises(ConfigError, match="there is no such folder"):
        export_model(tmp_path / "nothing", tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir() if "out" in path.name] == []


def test_an_adapter_for_another_base_leaves_nothing(tmp_path: Path) -> None:
    pytest.importorskip("peft")
    base = Original(text="qwen2").write_lm(tmp_path / "base")
    adapter = write_lora(Original(), tmp_path / "adapter")
    config = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps(config))
    tensors = load_file(adapter / "adapter_model.safetensors")
    name = next(name for name in tensors if "layers.0" in name)
    tensors[name.replace("layers.0", "layers.9")] = tensors.pop(name)
    from safetensors.torch import save_file

    save_file(tensors, adapter / "adapter_model.safetensors")
    with pytest.raises(
        ConfigError, match=r"trained on another model|do not belong|lack|none of the model"
    ):
        export_model(adapter, tmp_path / "out", base=base)
    assert [path.name for path in tmp_path.iterdir() if "out" in path.name] == []


def test_wrong_words_are_told(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no format 'gguf': use one of hf, vllm"):
        export_model(tiny_model(), tmp_path / "out", to="gguf")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="'huge' is not a size"):
        export_model(tiny_model(), tmp_path / "out", max_shard_size="huge")
    with pytest.raises(ConfigError, match="dtype='int3' is not known"):
        export_model(tiny_model(), tmp_path / "out", dtype="int3")
    assert list_all(tmp_path) == []
    assert parse_size("1.5 GiB") == 3 << 29


LIMITED = """
import resource, sys
from llava_ray.errors import UserError
from llava_ray.model.export.export import export_model
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
try:
    export_model(sys.argv[1], sys.argv[2])
except UserError as error:
    print(error.message)
"""


def test_a_full_disk_is_told_and_leaves_nothing(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", LIMITED, tiny_model(), tmp_path / "out"],
        capture_output=True,
        text=True,
    )
    assert "make room, or give another folder" in done.stdout, done.stderr
    assert list_all(tmp_path) == []
    with (
        pytest.raises(ConfigError, match=r"needs 1000000000.0 GB and .* GB are free there"),
        write_folder(tmp_path / "out", num_bytes=10**18),
    ):
        pass
