"""Conversation templates: prompts, ids and labels are those of LLaVA's own code."""

import hashlib
import json
import shutil
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest

from llava_ray.errors import ConfigError, RequestError, SampleError
from llava_ray.template import TEMPLATES, Notation, OwnTemplate, find_template
from llava_ray.template.own import VICUNA
from llava_ray.types import ImagePart, Message, TextPart
from tests.support.conversations import (
    byte_tokenizer,
    ids_of,
    learned,
    llama_tokenizer,
    relabel,
    relabel_lines,
    say,
    talk,
)

GOLDEN = Path(__file__).parents[1] / "golden"

USER = (
    "A chat between a curious user and an artificial intelligence assistant. The assistant gives "
    "helpful, detailed, and polite answers to the user's questions."
)
HUMAN = USER.replace("user", "human")
TAGGED = (
    "A chat between a curious user and an artificial intelligence assistant. The assistant is able "
    "to understand the visual content that the user provides, and assist the user with a variety "
    "of tasks using natural language.The visual content will be provided with the following "
    "format: <Image>visual content</Image>."
)
VISION = (
    "You are a helpful language and vision assistant. You are able to understand the visual "
    "content that the user provides, and assist the user with a variety of tasks using natural "
    "language."
)

# SHA-256, the first 16 digits, of what LLaVA's own code writes for `ASKED`, the image in front.
DIGESTS = {
    "v0": "499b74e9015be560",
    "llava_v0": "68702c7a24d86fe2",
    "v0_mmtag": "7cac3fd3c1c165a6",
    "vicuna_v1": "f6a34e0682847c6d",
    "llava_v1": "bed5e88b1b0152b1",
    "v1_mmtag": "8ae99c7c741eeb8d",
    "llama_2": "e8f2b25cb34b6663",
    "llava_llama_2": "870d7099d30a671c",
    "mistral_instruct": "0458368dd89c2f1d",
    "mpt": "503af3745129ae05",
    "chatml_direct": "d6a24146d37d5214",
    "plain": "98626bf50d167ee7",
}
ASKED = talk("What is this?\n<image>", "A cat.", "Why?")
TOKENIZERS = {
    "llama, legacy": lambda: llama_tokenizer(legacy=True, chatml=True),
    "llama": lambda: llama_tokenizer(legacy=False, chatml=True),
    "bytes": lambda: byte_tokenizer(begins=True, chatml=True),
    "bytes, no beginning": lambda: byte_tokenizer(begins=False, chatml=True),
}
CONVERSATIONS = {
    "text": talk("Name three colours.", "Red, green and blue."),
    "an image": talk("<image>\nWhat is it?", "A red circle."),
    "an image alone": talk("<image>", "A red circle."),
    "an image behind": talk("What is it?\n<image>", "A red\ncircle.", "Why?", " It  is so. "),
    "later images": talk("hi", "Hello!", "<image>\nand now?", "é 😀", "<image>\nnow?", "\nNo."),
    "several": talk("<image>\n<image>\nthe same?", "No.", "and <image> or <image>?", "Yes."),
}


def written(texts: list[str], *, tagged: bool = False) -> list[str]:
    """Messages as LLaVA's trainer writes them."""
    image = "<Image><image></Image>" if tagged else "<image>"
    return [text.replace("<image>", image) for text in texts]


TEXTS = {
    "text": ["Name three colours.", "Red, green and blue."],
    "an image": ["<image>\nWhat is it?", "A red circle."],
    "an image alone": ["<image>", "A red circle."],
    "an image behind": ["<image>\nWhat is it?", "A red\ncircle.", "Why?", " It  is so. "],
    "later images": ["hi", "Hello!", "<image>\nand now?", "é 😀", "<image>\nnow?", "\nNo."],
    "several": ["<image>\n<image>\nthe same?", "No.", "and <image> or <image>?", "Yes."],
}


# Prompts


@pytest.mark.parametrize("name", DIGESTS)
def test_a_prompt_is_that_of_the_original_code(name: str) -> None:
    messages = ASKED[:1] if name == "plain" else ASKED
    prompt = find_template(name).render(messages)
    assert hashlib.sha256(prompt.encode()).hexdigest()[:16] == DIGESTS[name], prompt


def test_prompts_in_full() -> None:
    prompts = {name: find_template(name).render(ASKED) for name in TEMPLATES}
    asked = "<image>\nWhat is this?"
    assert prompts["vicuna_v1"] == (
        f"{USER} USER: {asked} ASSISTANT: A cat.</s>USER: Why? ASSISTANT:"
    )
    assert prompts["llava_v0"] == (
        f"{HUMAN}###Human: {asked}###Assistant: A cat.###Human: Why?###Assistant:"
    )
    assert prompts["v1_mmtag"] == (
        f"{TAGGED} USER: <Image><image></Image> ASSISTANT: Received.</s>"
        "USER: What is this? ASSISTANT: A cat.</s>USER: Why? ASSISTANT:"
    )
    assert prompts["llava_llama_2"] == (
        f"[INST] <<SYS>>\n{VISION}\n<</SYS>>\n\n{asked} [/INST] A cat. </s><s>[INST] Why? [/INST]"
    )
    assert prompts["mistral_instruct"] == (f"[INST] {asked} [/INST] A cat. </s>[INST] Why? [/INST]")
    assert prompts["chatml_direct"] == (
        "<|im_start|>system\nAnswer the questions.<|im_end|>"
        f"<|im_start|>user\n{asked}<|im_end|><|im_start|>assistant\nA cat.<|im_end|>"
        "<|im_start|>user\nWhy?<|im_end|><|im_start|>assistant\n"
    )
    assert prompts["qwen"] == (
        "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
        f"<|im_start|>user\n{asked}<|im_end|>\n<|im_start|>assistant\nA cat.<|im_end|>\n"
        "<|im_start|>user\nWhy?<|im_end|>\n<|im_start|>assistant\n"
    )


def test_stop_texts() -> None:
    assert {name: template.stop for name, template in TEMPLATES.items()} == {
        **dict.fromkeys(["v0", "llava_v0", "v0_mmtag"], ("###",)),
        **dict.fromkeys(["vicuna_v1", "llava_v1", "v1_mmtag"], ("</s>",)),
        **dict.fromkeys(["llama_2", "llava_llama_2", "mistral_instruct"], ("</s>",)),
        **dict.fromkeys(["mpt", "chatml_direct", "qwen"], ("<|im_end|>",)),
        "plain": (),
    }


@pytest.mark.parametrize(
    ("name", "same"),
    [
        ("default", "v0"),
        ("v1", "vicuna_v1"),
        ("mistral_direct", "chatml_direct"),
        ("v0_plain", "plain"),
    ],
)
def test_second_names(name: str, same: str) -> None:
    assert find_template(name) is TEMPLATES[same]


def test_a_wrong_name_is_told_with_the_right_one() -> None:
    with pytest.raises(ConfigError, match=r"'vicuna_1'.*did you mean 'vicuna_v1'.*llava_llama_2"):
        find_template("vicuna_1")


@pytest.mark.parametrize("name", [name for name in TEMPLATES if name != "plain"])
def test_a_system_message_takes_the_place_of_the_templates_own(name: str) -> None:
    template = TEMPLATES[name]
    prompt = template.render([say("system", "Be brief."), *ASKED])
    assert "Be brief." in prompt
    assert not template.system or template.system not in prompt


@pytest.mark.parametrize(
    ("parts", "text"),
    [
        (["a", None], "<image>\na"),
        ([" a ", None, " b "], "<image>\na  b"),
        ([None], "<image>"),
        ([None, None, "which?"], "<image>\n<image>\nwhich?"),
        (["which?", None, None], "<image>\n<image>\nwhich?"),
        (["1: ", None, "\n2: ", None], "<image>\n<image>\n1: \n2:"),
        (["a ", None, " b ", None, " c"], "<image>\n<image>\na  b  c"),
        ([None, None], "<image>\n<image>"),
        (["", None, ""], "<image>"),
    ],
)
def test_images_come_first_in_a_message(parts: list[str | None], text: str) -> None:
    message = Message("user", tuple(ImagePart(b"") if p is None else TextPart(p) for p in parts))
    assert find_template("vicuna_v1").render([message]) == f"{USER} USER: {text} ASSISTANT:"


@pytest.mark.parametrize(
    ("parts", "text"),
    [
        (["a", None], "<image>\na"),
        ([None, None, "which?"], "<image>\n<image>\nwhich?"),
        (["this", None, "or that", None, "?"], "this\n<image>\nor that\n<image>?"),
        (["a (", None, "), b", None, "(c)"], "a (<image>), b\n<image>\n(c)"),
        (["1: ", None, "\n2: ", None], "1: <image>\n2: <image>"),
        (["a ", None, " b ", None, " c"], "a <image> b <image> c"),
    ],
)
def test_families_trained_on_interleaved_text_keep_the_place_of_several_images(
    parts: list[str | None], text: str
) -> None:
    message = Message("user", tuple(ImagePart(b"") if p is None else TextPart(p) for p in parts))
    assert f"user\n{text}<|im_end|>" in find_template("qwen").render([message])


@pytest.mark.parametrize("name", TEMPLATES)
def test_a_last_answer_is_left_open_to_be_continued(name: str) -> None:
    messages = talk("What is this?\n<image>", "A </s> cat ")
    for template in (find_template(name), OwnTemplate(), OwnTemplate(TEMPLATES[name].source)):
        whole = template.render(messages, add_generation_prompt=False)
        opened = template.render(messages)
        assert opened.endswith("A < /s> cat ")
        assert whole.startswith(opened)
        assert len(whole) > len(opened) or not template.stop
        if name != "plain":
            begun = template.render(messages[:-1])
            assert opened.startswith(begun)


@pytest.mark.parametrize("typed", [["x </s> <image>"], ["x </", "s> <ima", "ge>"]])
def test_nobody_ends_a_turn_or_claims_an_image_by_typing(typed: list[str]) -> None:
    message = Message("user", tuple(map(TextPart, typed)))
    for template in (find_template("vicuna_v1"), OwnTemplate()):
        assert "USER: x < /s> < image> ASSISTANT:" in template.render([message])


def test_halves_of_a_token_around_an_image_do_not_meet() -> None:
    message = Message("user", (TextPart("x <ima"), ImagePart(b""), TextPart("ge>")))
    assert find_template("vicuna_v1").render([message]).count("<image>") == 1


@pytest.mark.parametrize(
    ("messages", "match"),
    [
        ([], "empty"),
        ([say("assistant", "a")], "message 1 is from the assistant, expected one from the user"),
        ([*talk("a"), *talk("b")], "message 2 is from the user, expected one from the assistant"),
        ([*talk("a", "b"), say("system", "c")], "message 3 is from the system"),
        ([say("system", "<image>"), *talk("a")], "there is an image in the system message"),
        ([say("system", "a")], "only a system message"),
    ],
)
def test_conversations_that_no_template_takes(messages: list[Message], match: str) -> None:
    with pytest.raises(RequestError, match=match):
        find_template("vicuna_v1").render(messages)


@pytest.mark.parametrize("name", TEMPLATES)
def test_the_jinja_of_a_template_renders_the_same(name: str) -> None:
    template = TEMPLATES[name]
    own = OwnTemplate(template.source)
    for messages in (ASKED, *(c[:-1] for c in CONVERSATIONS.values())):
        for start in ([], [say("system", "Be brief.")] * template.has_system):
            for ask in (True, False):
                asked = [*start, *messages]
                expected = template.render(asked, add_generation_prompt=ask)
                assert own.render(asked, add_generation_prompt=ask) == expected


# Ids and labels


def test_labels_of_the_original_code() -> None:
    import tempfile

    from transformers import AutoTokenizer

    with tempfile.TemporaryDirectory() as folder:
        shutil.copy(GOLDEN / "labels" / "tokenizer" / "tokenizer.model", folder)
        settings = GOLDEN / "llava-v1.5-pad" / "checkpoint" / "tokenizer_config.json"
        settings = json.loads(settings.read_text()) | {"legacy": True}
        (Path(folder) / "tokenizer_config.json").write_text(json.dumps(settings))
        tokenizer = AutoTokenizer.from_pretrained(folder)
    for record in json.loads((GOLDEN / "labels" / "labels.json").read_text()):
        messages = talk(*(turn["value"] for turn in record["sample"]["conversations"]))
        encoded = find_template(record["version"]).encode(messages, tokenizer)
        assert encoded == (record["input_ids"], record["labels"])


TWO = {"vicuna_v1": (USER, False), "llava_v1": (HUMAN, False), "v1_mmtag": (TAGGED, True)}


@pytest.mark.parametrize("name", TWO)
@pytest.mark.parametrize("kind", CONVERSATIONS)
def test_style_two_is_masked_as_by_counting_rounds(name: str, kind: str) -> None:
    tokenizer = llama_tokenizer(legacy=True)
    system, tagged = TWO[name]
    texts = written(TEXTS[kind], tagged=tagged)
    rounds = [
        (f"{'' if i else system + ' '}USER: {texts[i]} ASSISTANT: ", texts[i + 1])
        for i in range(0, len(texts), 2)
    ]
    encoded = find_template(name).encode(CONVERSATIONS[kind], tokenizer)
    assert encoded == relabel(tokenizer, rounds, "</s>")


@pytest.mark.parametrize("name", ["llama_2", "llava_llama_2", "mistral_instruct"])
@pytest.mark.parametrize("kind", CONVERSATIONS)
@pytest.mark.parametrize("legacy", [True, False])
def test_style_llama_2_is_masked_as_by_counting_rounds(name: str, kind: str, legacy: bool) -> None:
    tokenizer = llama_tokenizer(legacy=legacy)
    template, texts = find_template(name), TEXTS[kind]
    begin = "" if name == "mistral_instruct" else "<s>"
    system = f"<<SYS>>\n{template.system}\n<</SYS>>\n\n" if template.system else ""
    rounds = [
        (f"{begin if i else ''}[INST] {'' if i else system}{texts[i]} [/INST] ", f"{texts[i + 1]} ")
        for i in range(0, len(texts), 2)
    ]
    encoded = template.encode(CONVERSATIONS[kind], tokenizer)
    assert encoded == relabel(tokenizer, rounds, "</s>")


SINGLE = {
    "v0": (HUMAN, False),
    "default": (HUMAN, False),
    "llava_v0": (HUMAN, False),
    "v0_mmtag": (TAGGED, True),
}


@pytest.mark.parametrize("name", SINGLE)
@pytest.mark.parametrize("kind", CONVERSATIONS)
@pytest.mark.parametrize("tokenizer", TOKENIZERS)
def test_style_single_is_masked_as_by_counting_lines(name: str, kind: str, tokenizer: str) -> None:
    system, tagged = SINGLE[name]
    texts = written(TEXTS[kind], tagged=tagged)
    lines = [("Assistant" if i % 2 else "Human", text) for i, text in enumerate(texts)]
    made = TOKENIZERS[tokenizer]()
    encoded = find_template(name).encode(CONVERSATIONS[kind], made)
    assert encoded == relabel_lines(made, f"{system}\n\n", lines)


def test_style_single_learns_answers_and_the_mark_behind_them() -> None:
    tokenizer = llama_tokenizer(legacy=True)
    conversation = talk("<image>\nWhat is it?", "A cat.", "Why?", "So.")
    encoded = find_template("llava_v0").encode(conversation, tokenizer)
    assert [text.strip() for text in learned(tokenizer, *encoded)] == [
        "###",
        "### Assistant: A cat.\n###",
        "### Assistant: So.\n###",
    ]


@pytest.mark.parametrize("name", ["plain", "v0_plain"])
@pytest.mark.parametrize("tokenizer", TOKENIZERS)
def test_plain_is_an_image_and_its_caption(name: str, tokenizer: str) -> None:
    made = TOKENIZERS[tokenizer]()
    encoded = find_template(name).encode(talk("Describe it.\n<image>", "A red circle"), made)
    ids = ids_of(made, "<image>A red circle\n")
    num_masked = len(ids_of(made, "<image>"))
    assert encoded == (ids, [-100] * num_masked + ids[num_masked:])


ENDS = {
    "vicuna_v1": "</s>",
    "llava_v1": "</s>",
    "v1_mmtag": "</s>",
    "llama_2": " </s>",
    "llava_llama_2": " </s>",
    "mistral_instruct": " </s>",
    "mpt": "<|im_end|>",
    "chatml_direct": "<|im_end|>",
    "qwen": "<|im_end|>",
}


@pytest.mark.parametrize("name", ENDS)
@pytest.mark.parametrize("kind", CONVERSATIONS)
@pytest.mark.parametrize("tokenizer", TOKENIZERS)
def test_what_is_learned_is_each_answer_and_its_end(name: str, kind: str, tokenizer: str) -> None:
    """With every tokenizer, also where LLaVA's trainer masks the whole sample: always with ChatML,
    with byte-level tokenizers, and in later rounds of new Llama tokenizers."""
    made = TOKENIZERS[tokenizer]()
    messages = CONVERSATIONS[kind]
    ids, labels = find_template(name).encode(messages, made)
    answers = TEXTS[kind][1::2]
    found = [text.lstrip(" ") for text in learned(made, ids, labels)]
    assert found == [answer.lstrip(" ") + ENDS[name] for answer in answers]


# LLaVA asks "v1_mmtag" with an exchange that its trainer does not write.
@pytest.mark.parametrize("name", [name for name in ENDS if name != "v1_mmtag"])
@pytest.mark.parametrize("kind", CONVERSATIONS)
@pytest.mark.parametrize("tokenizer", TOKENIZERS)
def test_what_is_trained_begins_as_what_is_asked(name: str, kind: str, tokenizer: str) -> None:
    made, template = TOKENIZERS[tokenizer](), find_template(name)
    messages = CONVERSATIONS[kind]
    if kind == "several" and not template.is_interleaved:
        messages = messages[:2]  # images within a later text come first in a prompt, see above
    ids, labels = template.encode(messages, made)
    starts = [i for i, (a, b) in enumerate(pairwise(labels)) if a == -100 != b]
    for number, start in enumerate(starts):
        prompt = ids_of(made, template.render(messages[: 2 * number + 1]))
        assert ids[: start + 1] == prompt


@pytest.mark.parametrize("marks", [("", ""), ("<im_start>", "<im_end>")])
def test_marks_around_images_are_encoded(marks: tuple[str, str]) -> None:
    tokenizer = llama_tokenizer(legacy=True)
    template = replace(find_template("vicuna_v1"), notation=Notation(marks=marks))
    messages = talk("What?\n<image>", "A cat.")
    asked = f"{USER} USER: {marks[0]}<image>{marks[1]}\nWhat? ASSISTANT: "
    assert template.encode(messages, tokenizer) == relabel(tokenizer, [(asked, "A cat.")], "</s>")
    assert template.render(messages[:1]) == asked.rstrip()


@pytest.mark.parametrize("tokenizer", TOKENIZERS)
def test_answers_with_separators_in_them_are_learned(tokenizer: str) -> None:
    """Of these LLaVA's trainer masks everything."""
    made = TOKENIZERS[tokenizer]()
    messages = talk("Say ASSISTANT: x", "USER: y ASSISTANT: z", "and </s>?", "w")
    ids, labels = find_template("vicuna_v1").encode(messages, made)
    assert [text.strip() for text in learned(made, ids, labels)] == [
        "USER: y ASSISTANT: z</s>",
        "w</s>",
    ]
    assert ids.count(made.eos_token_id) == 2


def test_an_answer_that_nobody_asked_for_is_left_out() -> None:
    tokenizer = llama_tokenizer(legacy=True)
    template = find_template("vicuna_v1")
    messages = talk("hi", "Hello.")
    first = [say("assistant", "Welcome!"), *messages]
    assert template.encode(first, tokenizer) == template.encode(messages, tokenizer)


def test_a_question_at_the_end_is_not_learned() -> None:
    tokenizer = llama_tokenizer(legacy=True)
    ids, labels = find_template("vicuna_v1").encode(talk("hi", "Hello.", "and?"), tokenizer)
    assert learned(tokenizer, ids, labels) == ["Hello.</s>"]


@pytest.mark.parametrize(
    ("name", "messages", "num_images", "match"),
    [
        ("vicuna_v1", [], None, "the conversation is empty"),
        ("vicuna_v1", talk("hi"), None, "no assistant message"),
        ("vicuna_v1", [*talk("hi"), *talk("ho")], None, "message 2 is from the user"),
        ("vicuna_v1", [*talk("a", "b"), say("assistant", "c")], None, "message 3 is from the ass"),
        ("vicuna_v1", talk("hi", ""), None, "message 2 is empty"),
        ("vicuna_v1", talk("", "Hello."), None, "message 1 is empty"),
        ("vicuna_v1", talk("<image>", "a"), 2, "contain 1 images and the sample has 2"),
        ("vicuna_v1", talk("a", "b"), 1, "contain 0 images and the sample has 1"),
        ("llava_v0", talk("<image><image>", "a"), 1, "contain 2 images and the sample has 1"),
        ("plain", talk("<image>", "a", "b", "c"), None, "'plain' is for captions"),
        ("plain", talk("<image>"), None, "'plain' is for captions"),
        ("plain", talk("hi", "a"), None, "'plain' is for captions"),
        ("plain", [say("system", "a"), *talk("<image>", "a")], None, "'plain' is for captions"),
    ],
)
def test_a_sample_that_cannot_be_encoded_is_named(
    name: str, messages: list[Message], num_images: int | None, match: str
) -> None:
    with pytest.raises(SampleError, match=f"sample 'no-7': .*{match}"):
        find_template(name).encode(
            messages, llama_tokenizer(legacy=True), sample_id="no-7", num_images=num_images
        )


def test_an_image_token_in_a_text_is_not_taken_for_an_image() -> None:
    messages = [Message("user", (TextPart("<image>\nWhat?"),)), *talk("", "a")[1:]]
    with pytest.raises(SampleError, match="sample 'x': the text of message 1 contains <image>"):
        find_template("vicuna_v1").encode(messages, llama_tokenizer(legacy=True), sample_id="x")


# The checkpoint's own template


@pytest.mark.parametrize("kind", CONVERSATIONS)
@pytest.mark.parametrize("tokenizer", TOKENIZERS)
def test_own_templates_are_encoded_with_labels(kind: str, tokenizer: str) -> None:
    made = TOKENIZERS[tokenizer]()
    whole = replace(OwnTemplate(VICUNA), notation=Notation(in_pieces=False))
    ids, labels = whole.encode(CONVERSATIONS[kind], made)
    found = [text.lstrip(" ") for text in learned(made, ids, labels)]
    assert found == [answer.lstrip(" ") + "</s>" for answer in TEXTS[kind][1::2]]


def test_an_own_template_may_end_turns_with_more_than_is_learned() -> None:
    tokenizer = byte_tokenizer(begins=False, chatml=True)
    special = ("<image>", "<|im_start|>", "<|im_end|>")
    template = OwnTemplate(find_template("qwen").source, notation=Notation(special_tokens=special))
    messages = CONVERSATIONS["an image behind"]
    assert template.encode(messages, tokenizer) == find_template("qwen").encode(messages, tokenizer)


def test_an_own_template_that_rewrites_the_past_cannot_be_encoded() -> None:
    source = (
        "{% for m in messages %}{{ m['role'] }}: "
        "{{ m['content'][0]['text'] if loop.last else '...' }}\n{% endfor %}"
        "{% if add_generation_prompt %}assistant: {% endif %}"
    )
    with pytest.raises(SampleError, match=r"sample 'x': .*message 2 differently.*by name"):
        OwnTemplate(source).encode(
            talk("a", "b", "c", "d"), byte_tokenizer(begins=True), sample_id="x"
        )


def test_what_an_own_template_refuses_is_told_with_the_sample() -> None:
    source = "{{ raise_exception('no images here') }}"
    with pytest.raises(SampleError, match=r"sample 'x': .*no images here"):
        OwnTemplate(source).encode(talk("a", "b"), byte_tokenizer(begins=True), sample_id="x")
