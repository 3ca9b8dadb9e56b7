"""The embedded model: its scenes, its questions, its training and what it answers."""

import json
import random
import re
import subprocess
import sys
from pathlib import Path

import pytest

from jobs.embedded_model import symbols
from llava_ray import demo
from llava_ray.demo import evaluate, hand_drawn, questions, scenes, sprites
from llava_ray.model.loading import load_model
from llava_ray.types import ImagePart, Message, TextPart

SCENES = [scenes.make_scene(random.Random(seed)) for seed in range(150)]
PLACES = {name: cell for cell, name in enumerate(questions.CELLS)}
NUMBERS = {name: count for count, name in enumerate(questions.COUNTS)}
SINGULAR = {questions.plural(name): name for name in (*scenes.THINGS, *scenes.CATEGORIES)}


def test_importing_the_demo_imports_no_torch():
    code = (
        "import sys, llava_ray.demo as d; d.make_example(1);"
        "assert not {'torch', 'transformers', 'ray'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_scene_and_its_image_are_exactly_repeatable():
    first, again = (scenes.make_scene(random.Random(3), num_items=9) for _ in range(2))
    assert first == again
    assert scenes.draw(first).tobytes() == scenes.draw(again).tobytes()
    assert scenes.draw(first).size == (scenes.PIXELS, scenes.PIXELS)
    assert first != scenes.make_scene(random.Random(4), num_items=9)


def test_a_disguised_shape_lacks_a_name_and_its_tower_learns_only_the_rest() -> None:
    rng = random.Random(0)
    plain = scenes.make_scene(rng, num_items=9, kinds=("shape",))
    disguised = scenes.disguise(rng, plain, 1.0)
    name, colour = list(symbols.FIELDS).index("name"), list(symbols.FIELDS).index("colour")
    for item, before, values in zip(
        disguised.items, plain.items, symbols.spell(disguised), strict=True
    ):
        assert scenes.UNNAMED in (item.name, item.colour)
        assert (values[name] == symbols.IGNORED) == (item.name == scenes.UNNAMED)
        assert (values[colour] == symbols.IGNORED) == (item.colour == scenes.UNNAMED)
        assert (item.size, item.x, item.y) == (before.size, before.x, before.y)
    assert scenes.draw(disguised).tobytes() != scenes.draw(plain).tobytes()


def test_every_item_is_painted_inside_its_own_cell():
    for seed in range(40):
        scene = scenes.make_scene(random.Random(seed), num_items=9)
        empty = scenes.draw(scenes.Scene((), scene.background, scene.slope)).load()
        for item in scene.items:
            alone = scenes.draw(scenes.Scene((item,), scene.background, scene.slope)).load()
            painted = {
                (x // scenes.CELL, y // scenes.CELL)
                for x in range(scenes.PIXELS)
                for y in range(scenes.PIXELS)
                if alone[x, y] != empty[x, y]
            }
            assert painted == {(item.column, item.row)}, item


def test_training_scenes_hold_no_held_out_combination_and_test_scenes_do():
    def held_out(scene: scenes.Scene) -> list[bool]:
        return [scenes.is_held_out(i.kind, i.name, i.colour, i.cell) for i in scene.items]

    for seed in range(400):
        assert not any(held_out(scenes.make_scene(random.Random(seed), num_items=9)))
        assert any(held_out(scenes.make_scene(random.Random(seed), held_out=True)))


def test_every_thing_has_its_own_image():
    images = {sprites.thing(name, 40).tobytes() for name in scenes.THINGS}
    assert len(images) == len(scenes.THINGS) == 60


def test_examples_are_repeatable_and_fit_their_scene():
    (image, asked), (same, asked_again) = demo.make_example(7), demo.make_example(7)
    assert image.tobytes() == same.tobytes()
    assert asked == asked_again
    assert len(asked) == len(set(asked)) == 4
    assert demo.make_example(8)[0].tobytes() != image.tobytes()


# ---- every answer, checked by reading the question ---------------------------------------------


def meant(phrase: str, scene: scenes.Scene) -> list[scenes.Item]:
    """The items that a phrase such as "large red circle" can mean."""
    for thing in sorted(scenes.THINGS, key=len, reverse=True):
        if phrase.endswith(thing):
            words = [*phrase.removesuffix(thing).split(), thing]
            break
    else:
        words = phrase.split()
    return [
        item
        for item in scene.items
        if all(
            word in {item.kind, item.category, item.name, item.colour, item.size, "object"}
            for word in words
        )
    ]


def only(phrase: str, scene: scenes.Scene) -> scenes.Item:
    (item,) = meant(phrase, scene)
    return item


def cell_of(place: str) -> int:
    name = place.removesuffix(" corner").replace("upper", "top").replace("lower", "bottom")
    return PLACES[re.sub("cent(er|re)", "middle", name)]


def at(place: str, scene: scenes.Scene) -> scenes.Item | None:
    return {item.cell: item for item in scene.items}.get(cell_of(place))


def singular(noun: str) -> str:
    known = {*scenes.THINGS, *scenes.SHAPES, *scenes.CATEGORIES, "shape", "number"}
    return noun if noun in known else SINGULAR.get(noun, noun.removesuffix("s"))


def yes(truth: object) -> str:
    return "Yes." if truth else "No."


IS_THERE = r"(?:Is there|Do you see|Can you see|Does the picture show|Is) (?:an?|the|any) (.+?)"
IMAGE = "(?:picture|image)"
END = rf"(?: in the {IMAGE}| in this {IMAGE})?\?"


def check_existence(question: str, scene: scenes.Scene) -> str:
    if match := re.fullmatch(r"(?:Is there|Do you see) (?:any|some)thing in the (.+)\?", question):
        return yes(at(match[1], scene))
    match = re.fullmatch(r"Is there (an?|the) (.+) in the (.+)\?", question)
    if match and match[3] not in ("picture", "image"):
        return yes(at(match[3], scene) in meant(match[2], scene))
    if match := re.fullmatch(
        r"(?:Is|Are|Do|Can) (?:there|you see)(?: any| an?)? (\w+)\?", question
    ):
        return yes(meant(singular(match[1]), scene))
    match = re.fullmatch(IS_THERE + END, question)
    assert match, question
    return yes(meant(match[1], scene))


def check_colour(question: str, scene: scenes.Scene) -> str:
    if match := re.search(r"in the (.+)\?", question):
        return f"{at(match[1], scene).colour.capitalize()}."
    if match := re.fullmatch(r"Is the (.+) (\w+)\?", question):
        return yes(only(match[1], scene).colour == match[2])
    (phrase,) = re.findall(r"(?:^The| the) (?!colour)(.+?)(?: has what colour)?[?.]", question)
    phrase = phrase.removeprefix("colour of the ")
    return f"{only(phrase, scene).colour.capitalize()}."


def check_shape(question: str, scene: scenes.Scene) -> str:
    if match := re.search(r"in the (.+)\?", question):
        return f"A {at(match[1], scene).name}."
    (colour,) = [colour for colour in scenes.COLOURS if colour in question]
    return f"A {only(f'{colour} shape', scene).name}."


def check_counting(question: str, scene: scenes.Scene) -> str:
    match = re.search(
        r"(?:How many|number of|Count the) (.+?)(?: (?:are|do|can) .+)?[?.]", question
    )
    *modifiers, noun = [match[1]] if match[1] in SINGULAR else match[1].split()
    noun = "object" if noun in ("objects", "items") else singular(noun)
    count = len(meant(" ".join([*modifiers, noun]), scene))
    return f"{questions.COUNTS[count]}."


def check_position(question: str, scene: scenes.Scene) -> str:
    relation = re.fullmatch(
        r"Is the (.+?) (?:to the |on the )?(left of|right of|above|over|higher than|below|under|"
        r"lower than) the (.+)\?",
        question,
    )
    if relation:
        one, other = only(relation[1], scene), only(relation[3], scene)
        match relation[2]:
            case "left of":
                return yes(one.x < other.x)
            case "right of":
                return yes(one.x > other.x)
            case "above" | "over" | "higher than":
                return yes(one.y < other.y)
            case _:
                return yes(one.y > other.y)
    match = re.search(rf"(?:is|see|find|Where's) the (.+?)(?: in the {IMAGE})?\?", question)
    name = match[1]
    return f"In the {questions.CELLS[only(name, scene).cell]}."


def check_comparison(question: str, scene: scenes.Scene) -> str:
    if match := re.search(r"(larg|bigg|small)er[,:] the (.+) or the (.+)\?", question):
        pair = sorted((only(p, scene).pixels, p) for p in (match[2], match[3]))
        return f"The {pair[0 if match[1] == 'small' else 1][1]}."
    if match := re.fullmatch(r"Is the (.+) (larg|bigg|small)er than the (.+)\?", question):
        one, other = only(match[1], scene).pixels, only(match[3], scene).pixels
        return yes(one < other if match[2] == "small" else one > other)
    if match := re.search(r"(largest|biggest|smallest)", question):
        items = sorted((i for i in scene.items if i.kind != "number"), key=lambda i: i.pixels)
        return f"The {questions.what(items[0 if match[1] == 'smallest' else -1])[2:].strip()}."
    name = re.search(r"the (.+?)(?: small, medium or large)?\?", question)[1]
    return f"{only(name, scene).size.capitalize()}."


def check_number(question: str, scene: scenes.Scene) -> str:
    if match := re.search(r"in the (.+)[?.]", question):
        return f"{at(match[1], scene).name}."
    names = [item.name for item in scene.items if item.kind == "number"]
    return f"{' and '.join([', '.join(names[:-1]), names[-1]] if names[1:] else names)}."


def check_things(question: str, scene: scenes.Scene) -> str:
    if match := re.search(rf"in the (?!{IMAGE})(.+?)(?: of the {IMAGE})?[?.]", question):
        found = [item] if (item := at(match[1], scene)) else []
    else:
        (category,) = [c for c in scenes.CATEGORIES if c in question]
        found = meant(category, scene)
    if not found:
        return "Nothing."
    parts = [
        f"the number {item.name}"
        if item.kind == "number"
        else f"{'an' if (item.colour or item.name)[0] in 'aeiou' else 'a'} "
        + " ".join(filter(None, [item.colour, item.name]))
        for item in found
    ]
    text = " and ".join([", ".join(parts[:-1]), parts[-1]] if parts[1:] else parts)
    return f"{text[0].upper()}{text[1:]}."


CHECKS = {
    "existence": check_existence,
    "colour": check_colour,
    "shape": check_shape,
    "counting": check_counting,
    "position": check_position,
    "comparison": check_comparison,
    "number": check_number,
    "things": check_things,
}


@pytest.mark.parametrize("kind", CHECKS)
def test_every_answer_is_what_reading_the_question_finds_in_the_scene(kind):
    num_asked = 0
    for seed, scene in enumerate(SCENES * 6):
        rng = random.Random(seed)
        question = questions.ask(kind, questions.Asker(scene, rng))
        if question:
            assert CHECKS[kind](question.text, scene) == question.answer, question.text
            num_asked += 1
    assert num_asked > 200


def test_what_a_question_takes_for_granted_is_missing_when_the_answer_says_so():
    for seed, scene in enumerate(SCENES * 4):
        question = questions.ask("absent", questions.Asker(scene, random.Random(seed)))
        if question and (match := re.fullmatch(r"There is no (.+)\.", question.answer)):
            assert not meant(match[1], scene)
        if question and (match := re.fullmatch(r"There are (\w+) (.+)\.", question.answer)):
            *modifiers, noun = [match[2]] if match[2] in SINGULAR else match[2].split()
            assert (
                len(meant(" ".join([*modifiers, singular(noun)]), scene))
                == NUMBERS[match[1].capitalize()]
            )


def test_yes_and_no_are_about_equally_often_right():
    rng = random.Random(0)
    answers = []
    for scene in SCENES * 8:
        question = questions.ask("existence", questions.Asker(scene, rng))
        answers += [question.answer] if question else []
    assert 0.4 < answers.count("Yes.") / len(answers) < 0.6


def test_a_description_names_every_item_in_one_or_two_sentences():
    for scene in SCENES:
        text = questions.describe(scene)
        assert text.count(".") in (1, 2)
        assert all(item.name in text for item in scene.items)
        assert all(questions.where(item.cell) in text for item in scene.items)


def test_of_an_empty_image_every_answer_says_that_nothing_is_there():
    for seed in range(100):
        rng = random.Random(seed)
        turns = questions.make_conversation(rng, [scenes.make_empty_scene(rng)], num_turns=8)
        for turn in turns:
            if turn.kind != "talk":
                assert re.match(r"(No|None|Nothing|There is (no .+|nothing in .+))\.$", turn.answer)


def test_questions_after_a_new_image_are_about_the_new_image():
    for seed in range(60):
        rng = random.Random(seed)
        shown = [scenes.make_scene(rng) for _ in range(2)]
        turns = questions.make_conversation(rng, shown, num_turns=6)
        assert [turn.image for turn in turns if turn.image] == shown
        latest = None
        for turn in turns:
            latest = turn.image or latest
            if turn.kind == "description":
                assert turn.answer == questions.describe(latest)


def test_without_an_image_every_question_about_one_is_answered_by_saying_so():
    turns = questions.make_conversation(random.Random(0), [], num_turns=40)
    assert {turn.answer for turn in turns if turn.kind != "talk"} == {
        "I see no picture yet. Please add one."
    }


# ---- the recipe ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tokenizer():
    from jobs.embedded_model import language

    return language.train_tokenizer(num_conversations=1500)


def test_training_writes_conversations_as_the_chat_template_does(tokenizer):
    from jobs.embedded_model import language

    encoder = language.ConversationEncoder(tokenizer, random.Random(0))
    rng = random.Random(1)
    turns = questions.make_conversation(
        rng, [scenes.make_scene(rng) for _ in range(2)], num_turns=5
    )
    messages = []
    for turn in turns:
        image = [{"type": "image"}] if turn.image else []
        content = [*image, {"type": "text", "text": turn.question}]
        messages.append({"role": "user", "content": content})
        messages.append({"role": "assistant", "content": turn.answer})
    rendered = tokenizer.apply_chat_template(messages, tokenize=False)
    expanded = rendered.replace(language.IMAGE, language.IMAGE * language.NUM_PATCHES)
    encoded = encoder.encode(turns, is_strict=True)
    assert tokenizer(expanded, add_special_tokens=False)["input_ids"] == encoded.ids
    taught = [label for label in encoded.labels if label != language.IGNORED]
    answers = "".join(f" {turn.answer}{language.EOS}" for turn in turns)
    assert tokenizer.decode(taught) == answers


def test_any_text_survives_the_tokenizer(tokenizer):
    text = "Ça va? 你好 \N{PARTY POPPER}\n\tZx9"
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    assert len(tokenizer(" 42")["input_ids"]) == 3  # every digit is a token


@pytest.mark.slow
def test_seconds_of_training_lowers_every_stage_s_loss(tokenizer, tmp_path, capsys):
    from jobs.embedded_model import joined, reader, tower
    from jobs.embedded_model.pace import Pace

    pace = Pace(minutes=0.05, log_every_s=0)
    tower.train_tower(tmp_path / "tower.pt", pace)
    reader.train_reader(tmp_path / "reader.pt", pace, tokenizer)
    joined.align_projector(
        tmp_path / "joined.pt", pace, tokenizer,
        tower=tmp_path / "tower.pt", reader=tmp_path / "reader.pt",
    )  # fmt: skip
    printed = capsys.readouterr().out
    for stage, name in (("tower", "loss"), ("reader", "answer"), ("align", "loss")):
        losses = [float(x) for x in re.findall(rf"^{stage} .* {name} ([\d.]+)", printed, re.M)]
        assert losses[-1] < 0.9 * losses[0], stage


# ---- the shipped model ---------------------------------------------------------------------------


@pytest.fixture(scope="module")
def answerer():
    from llava_ray.demo.evaluate import SceneModel

    return SceneModel(demo.MODEL_DIR)


@pytest.fixture(scope="module")
def cases():
    from llava_ray.demo import evaluate

    return [
        case for case in evaluate.make_cases(12, seed=1) if case.kind in evaluate.TARGETS
    ]  # fmt: skip


def test_the_shipped_folder_is_small_and_holds_published_tensor_names():
    from safetensors import safe_open

    assert sum(file.stat().st_size for file in demo.MODEL_DIR.iterdir()) < 30e6
    with safe_open(demo.MODEL_DIR / "model.safetensors", "pt") as weights:
        names = list(weights.keys())
    prefixes = {re.match(r"[a-z_]+\.(?:vision_model|model|lm_head)?", name)[0] for name in names}
    assert prefixes == {
        "vision_tower.vision_model", "language_model.model", "language_model.lm_head",
        "multi_modal_projector.",
    }  # fmt: skip


def test_training_goes_on_from_the_shipped_folder_with_the_same_weights(tmp_path):
    import torch

    from jobs.embedded_model import joined, pace, recipe

    recipe.unpack(demo.MODEL_DIR, tmp_path)
    tokenizer = recipe.load_tokenizer(tmp_path / "tokenizer")
    model = joined.Joined(tokenizer)
    untrained = {name: tensor.clone() for name, tensor in model.teachers().items()}
    pace.resume(model, tmp_path / "joint.pt")
    assert not any(torch.equal(untrained[name], t) for name, t in model.teachers().items())
    recipe.write_model(tmp_path / "joint.pt", tmp_path / "again", tokenizer)
    for name in ("model.safetensors", "config.json", "tokenizer.json"):
        shipped = (demo.MODEL_DIR / name).read_bytes()
        assert (tmp_path / "again" / name).read_bytes() == shipped, name


def test_a_folder_without_what_it_was_taught_with_cannot_be_trained_on(tmp_path):
    from jobs.embedded_model import recipe
    from llava_ray.errors import ConfigError

    with pytest.raises(ConfigError, match=r"has no teachers\.pt: give the folder of a model"):
        recipe.train(tmp_path / "out", start=tmp_path, budget_minutes=0.1)


def test_the_shipped_model_answers_held_out_questions(answerer, cases):
    from llava_ray.demo.evaluate import prior

    answers = answerer.answer(cases)
    right = [answer == case.answer for case, answer in zip(cases, answers, strict=True)]
    assert sum(right) / len(right) > prior(cases) + 0.15


def test_the_shipped_model_falls_to_the_prior_without_the_image(answerer, cases):
    from llava_ray.demo.evaluate import prior

    answers = answerer.answer(cases, is_blind=True)
    right = [answer == case.answer for case, answer in zip(cases, answers, strict=True)]
    assert sum(right) / len(right) < prior(cases) + 0.1


def test_the_shipped_model_says_so_when_there_is_no_image_or_no_question_about_one(answerer):
    from llava_ray.demo import talk

    said = answerer.chat(["What colour is the circle?", "Write a poem."])
    assert said == [talk.NO_IMAGE, talk.KNOWS]


def test_the_shipped_scores_are_of_a_model_that_looks():
    from llava_ray.demo import evaluate

    stored = json.loads((demo.MODEL_DIR / "scores.json").read_text())
    assert stored["num_scenes"] == 1000
    for kind in evaluate.TARGETS:
        score = stored["kinds"][kind]
        assert score["exact"] > score["prior"] + 0.25 > score["blind"] + 0.25, kind


def test_the_documentation_tells_the_stored_scores():
    text = (Path(__file__).parents[2] / "docs" / "embedded-model.md").read_text()
    stored = json.loads((demo.MODEL_DIR / "scores.json").read_text())
    for kind, score in stored["kinds"].items():
        assert f"| {kind} | {score['num_questions']} | {100 * score['exact']:.1f} % |" in text


def test_a_prompt_is_the_same_wherever_its_image_stands() -> None:
    template = load_model("demo", device="cpu").template
    image, text = ImagePart(b""), TextPart("What colour is the circle?")
    halves = (TextPart("What colour "), TextPart("is the circle?"))
    expected = template.render([Message("user", (image, text))])
    assert expected.endswith("USER: <image>\nWhat colour is the circle? ASSISTANT:")
    for messages in (
        [Message("user", (text, image))],
        [Message("user", (halves[0], image, halves[1]))],
        [Message("user", (image,)), Message("user", (text,))],
    ):
        assert template.render(messages) == expected


def test_hand_drawn_images_are_asked_about_and_share_nothing_with_training() -> None:
    cases = evaluate.make_drawn_cases(30)
    assert {case.kind for case in cases} == set(hand_drawn.KINDS)
    for case in cases:
        assert case.image is not None
        assert case.image.size != (scenes.PIXELS, scenes.PIXELS)
        for item in case.scene.items:
            assert 0.05 * scenes.PIXELS - 1 <= item.pixels <= 0.8 * scenes.PIXELS + 1
            centre = (item.x / scenes.PIXELS, item.y / scenes.PIXELS)
            place = tuple(round(part * case.image.width) for part in centre)
            assert case.image.getpixel(place) == item.ink
