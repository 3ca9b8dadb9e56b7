"""Llama's tokenizers give the ids of LLaVA's code, whatever their files leave unsaid."""

import io
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import sentencepiece

from llava_ray.errors import ConfigError
from llava_ray.model.checkpoint.inspect import inspect_checkpoint
from llava_ray.model.doctor import diagnose
from llava_ray.model.processor import load_llava_tokenizer
from llava_ray.template import tokenize_pieces
from llava_ray.template.tokens import Notation, Segment, encode_segments
from tests.support.llava_checkpoints import Original
from tests.support.reference_logits import GOLDEN, load

TEXTS = [
    "what is it",
    " with",
    "  two",
    "\n",
    " ",
    "",
    "a</s>USER: what",
    "a</s> USER:",
    "</s>a <s>",
    "</s> a",
    "é 你 ﬁ\u00a0x",
    "▁a ▁ b",
]
PROMPTS = [
    "USER: <image>\nWhat is it? ASSISTANT:",
    "<image> and<image>, <image><image>  too",
    "<image>",
    "a</s> <image></s>b <image> </s>",
]
CORPUS = "USER: What is it? ASSISTANT: It is a red circle and what with two </s> of them.\n"
SAID = {"add_bos_token": True, "add_eos_token": False, "tokenizer_class": "LlamaTokenizer"}


@pytest.fixture(scope="module", params=[True, False], ids=["a space first", "no space first"])
def model(request) -> bytes:
    """A SentencePiece model, of those that put a space before a text or those that do not."""
    written = io.BytesIO()
    sentencepiece.SentencePieceTrainer.Train(
        sentence_iterator=iter([CORPUS] * 20),
        model_writer=written,
        model_type="bpe",
        vocab_size=330,
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        allow_whitespace_only_pieces=True,
        add_dummy_prefix=request.param,
        minloglevel=2,
    )
    return written.getvalue()


def write(folder: Path, model: bytes, settings: dict[str, Any] | None, text: str = "llama") -> Path:
    """Write a checkpoint that is all there for its tokenizer."""
    original = Original(text=text)
    original.write(folder)
    for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"):
        (folder / name).unlink(missing_ok=True)
    (folder / "tokenizer.model").write_bytes(model)
    if settings is not None:
        (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder


def read(folder: Path) -> Any:
    return load_llava_tokenizer(inspect_checkpoint(folder))


def spell(model: bytes, *, each: bool, spaced: bool | None = None) -> Callable[[str], list[int]]:
    """Return what SentencePiece itself gives a text, special tokens cut out of it.

    `each` part begins as a text does, or else only the first; `spaced` says how texts begin where
    that is not the model's to say.
    """
    processor: Any = sentencepiece.SentencePieceProcessor(model_proto=model)
    own = processor.EncodeAsPieces("a")[0].startswith("▁")
    space = own if spaced is None else spaced
    newline = processor.EncodeAsIds("\n")[own:]

    def bare(part: str) -> list[int]:
        return processor.EncodeAsIds(f"\n{part}")[len(newline) + own :]

    def spelled(text: str) -> list[int]:
        ids = [1]
        for i, part in enumerate(re.split("(<s>|</s>)", text)):
            if part in ("<s>", "</s>"):
                ids.append(processor.PieceToId(part))
            elif part:
                ids += bare(f" {part}" if space and (each or i == 0) else part)
        return ids

    return spelled


@pytest.mark.parametrize("settings", [{"legacy": False}, {"legacy": False, **SAID}])
def test_one_space_before_the_whole_text(settings, model, tmp_path):
    tokenizer = read(write(tmp_path / "model", model, settings))
    expected = spell(model, each=False, spaced=True)
    assert [tokenizer(text).input_ids for text in TEXTS] == [expected(text) for text in TEXTS]


@pytest.mark.parametrize("settings", [None, {}, SAID, {**SAID, "legacy": True}, {"legacy": None}])
def test_a_space_before_each_part_where_nothing_is_said(settings, model, tmp_path):
    tokenizer = read(write(tmp_path / "model", model, settings))
    expected = spell(model, each=True)
    assert [tokenizer(text).input_ids for text in TEXTS] == [expected(text) for text in TEXTS]


@pytest.mark.parametrize("legacy", [True, False])
def test_mistrals_tokenizer_is_that_in_rust_which_puts_a_space_before_each_part(
    legacy, model, tmp_path
):
    tokenizer = read(write(tmp_path / "model", model, {**SAID, "legacy": legacy}, "mistral"))
    expected = spell(model, each=True, spaced=True)
    assert [tokenizer(text).input_ids for text in TEXTS] == [expected(text) for text in TEXTS]
    assert tokenizer.decode(tokenizer("what is it").input_ids[1:]) == "what is it"


@pytest.mark.parametrize("legacy", [True, False])
def test_each_piece_of_a_prompt_begins_as_a_text_does(legacy, model, tmp_path):
    tokenizer = read(write(tmp_path / "model", model, {"legacy": legacy}))
    spelled = spell(model, each=legacy, spaced=None if legacy else True)
    for prompt in PROMPTS:
        first, *others = prompt.split("<image>")
        expected = spelled(first)
        for piece in others:
            expected += [-200, *spelled(piece)[1:]]
        assert tokenize_pieces(tokenizer, prompt) == expected
        encoded = encode_segments(tokenizer, [Segment("</s>"), Segment(prompt, True)], Notation())
        assert [id_ for id_ in encoded.labels[2:] if id_ >= 0] == [
            id_ for id_ in encoded.input_ids[2:] if id_ >= 0
        ]


def test_a_tokenizer_in_rust_is_run_as_its_file_says(model, tmp_path):
    folder = write(tmp_path / "a", model, SAID, "mistral")
    tokenizer = read(folder)
    tokenizer.save_pretrained(folder)
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps({**settings, **SAID}))
    described = json.loads((folder / "tokenizer.json").read_text())
    again = read(folder)
    assert [again(text).input_ids for text in TEXTS] == [tokenizer(t).input_ids for t in TEXTS]
    described["normalizer"] = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
    (folder / "tokenizer.json").write_text(json.dumps(described))
    expected = spell(model, each=True, spaced=False)
    changed = read(folder)
    assert [changed(text).input_ids for text in TEXTS] == [expected(text) for text in TEXTS]


def test_tokens_that_the_files_lack_are_counted_on_in_llavas_order(model, tmp_path):
    folder = write(tmp_path / "model", model, SAID)
    config = Original().config() | {"mm_use_im_start_end": True}
    added = ["<im_patch>", "<im_start>", "<im_end>", "<image>"]
    for has_patch in (True, None, False):  # LLaVA's code adds it where nothing is said
        config["mm_use_im_patch_token"] = has_patch
        if has_patch is None:
            del config["mm_use_im_patch_token"]
        (folder / "config.json").write_text(json.dumps(config))
        expected = added[has_patch is False :]
        ids = read(folder).convert_tokens_to_ids(expected)
        assert ids == list(range(330, 330 + len(expected)))


def test_marks_without_rows_in_the_embeddings_are_an_error(tmp_path):
    original = Original(extra={"mm_use_im_start_end": True})
    folder = original.write(tmp_path / "model")
    problem = "rows of the embeddings are too few for <im_start> and <im_end>: give as base"
    with pytest.raises(ConfigError, match=problem):
        load(folder)
    assert any(problem in found for found in diagnose(folder).problems)


def test_a_damaged_tokenizer_is_named(model, tmp_path):
    folder = write(tmp_path / "model", model, SAID)
    (folder / "tokenizer.model").write_bytes(model[: len(model) // 2])
    with pytest.raises(ConfigError, match="model"):
        load(folder)


# What LLaVA's code at its last commit gave, with the golden files' vocabulary.
OF_THE_ORIGINAL = {
    " with": ([1, 1114, 385],) * 2,
    "\n": ([1, 1114, 13],) * 2,
    "  x": ([1, 1114, 1114, 1114, 1153],) * 2,
    "a</s>USER: what": (
        [1, 263, 2, 1173, 1155, 577, 1143, 408, 267],
        [1, 263, 2, 897, 1155, 577, 1143, 408, 267],
    ),
    "</s> a": ([1, 2, 263], [1, 2, 1114, 263]),
    "</s>a <s>": ([1, 2, 1119, 1114, 1], [1, 2, 263, 1114, 1]),
}


@pytest.mark.parametrize("kind", ["legacy: false", "not said", "mistral"])
def test_ids_of_the_original_code(kind, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(GOLDEN / "llava-v1.5-pad" / "checkpoint", folder, copy_function=shutil.copyfile)
    folder.chmod(0o755)
    shutil.copytree(GOLDEN / "openai-clip-micro", tmp_path / "openai-clip-micro")
    if kind == "not said":
        (folder / "tokenizer_config.json").write_text(json.dumps(SAID))
    if kind == "mistral":
        config = json.loads((folder / "config.json").read_text())
        named = {"model_type": "llava_mistral", "architectures": ["LlavaMistralForCausalLM"]}
        (folder / "config.json").write_text(json.dumps(config | named))
    tokenizer = read(folder)
    for text, expected in OF_THE_ORIGINAL.items():
        assert tokenizer(text).input_ids == expected[kind != "legacy: false"]
