"""Generates texts that are not questions about the image, and varies how questions are written.

The model answers such texts with one of a few sentences. Their variety keeps it from mistaking
unrelated text for a question about shapes.
"""

import random

NO_IMAGE = "I see no picture yet. Please add one."
KNOWS = (
    "I know only coloured shapes, sixty everyday things and printed numbers. "
    "Ask me what there is, where, how many, what colour or which is larger."
)
HELLO = "Hello! Show me a picture and ask me what is in it."
WHO = "I am a very small LLaVA. " + KNOWS
WELCOME = "You are welcome."
GOODBYE = "Goodbye!"
COLOURS_ONLY = "I know the colours of shapes only."

STRANGE_THINGS = tuple(
    "zebra giraffe wolf tiger horse sheep chicken duck snake spider whale shark camel goat "
    "person man woman child baby boy girl face hand tree flower house building road river "
    "mountain sun moon cloud table chair bed sofa lamp window door cup bottle plate fork knife "
    "spoon book phone computer keyboard television clock watch hat shirt shoe bag umbrella ball "
    "guitar piano drum violin camera truck van motorcycle ship submarine tent castle bridge "
    "sandwich salad soup cherry grape orange peach melon potato onion pepper candle ring crown "
    "robot ghost dragon unicorn rainbow snowman balloon gift flag map rope nail shovel rake "
    "broom mirror towel pillow blanket carpet stove fridge oven sink toilet skateboard kite "
    "hexagon pentagon rectangle oval cube sphere cylinder cone".split()
)
_NOUNS = (
    *STRANGE_THINGS,
    *"love war peace music science history money time water fire air weather football chess "
    "cooking school work family friendship space physics mathematics poetry art politics "
    "philosophy health sleep dreams travel language computers engines dinosaurs bread coffee tea "
    "chocolate summer winter spring autumn gravity light energy electricity democracy Ray Python "
    "JavaScript software code networks planets stars oceans volcanoes birds insects plants".split(),
)
_PLACES = (
    "France Germany Spain Italy Japan China India Brazil Canada Mexico Egypt Kenya Norway Sweden "
    "Poland Greece Turkey Russia Australia Argentina Paris London Berlin Rome Madrid Tokyo Beijing "
    "Delhi Cairo Oslo Vienna Prague Lisbon Athens Chicago Boston Texas Europe Africa Asia"
).split()
_PEOPLE = (
    "Einstein Newton Darwin Shakespeare Mozart Napoleon Cleopatra Plato Galileo Picasso Beethoven "
    "Gandhi Lincoln Curie Turing Bach Dante Homer Caesar Columbus Tesla Edison Chopin Kant"
).split()
_VERBS = (
    "run sing dance cook swim fly write read draw think learn teach build fix paint sleep eat "
    "drink drive jump speak listen study travel code play win sell buy grow plant clean"
).split()
_ADJECTIVES = (
    "good bad big small happy sad fast slow old new hot cold funny serious easy hard best worst "
    "cheap famous important beautiful strange healthy dangerous modern ancient"
).split()
_GREETINGS = (
    "Hi", "Hello", "Hey", "Hello there", "Hi there", "Good morning", "Good evening", "Good day",
    "Good afternoon", "Greetings", "Hey there", "Howdy", "Hi, how are you?", "How are you?",
    "Hello, how are you today?", "How do you do?", "What's up?", "Nice to meet you.", "Hello world",
)  # fmt: skip
_WHO = (
    "Who are you?", "What are you?", "What is your name?", "What's your name?", "What can you do?",
    "What do you know?", "Who made you?", "Are you a robot?", "Are you ChatGPT?", "Help",
    "What model are you?", "Tell me about yourself.", "How can you help me?", "Are you human?",
    "What can I ask?", "What can I ask you?", "What should I ask?", "Which model is this?",
    "What are you able to do?", "Introduce yourself.", "What questions can you answer?",
    "Are you an AI?", "How do you work?", "What kind of pictures do you know?",
)  # fmt: skip
_THANKS = (
    "Thanks", "Thank you", "Thank you!", "Thanks a lot!", "Great, thanks.", "Thank you very much.",
    "Many thanks!", "Good job!", "Well done.", "Nice!", "Great!", "Perfect, thank you.",
)  # fmt: skip
_GOODBYES = ("Bye", "Goodbye", "Bye bye!", "See you!", "See you later.", "Good night.", "Goodbye!")
_TEMPLATES = (
    "What is the capital of {place}?", "Where is {place}?", "How far is it to {place}?",
    "What is the population of {place}?", "Who is the president of {place}?",
    "What language do they speak in {place}?", "Tell me about {place}.",
    "What is the weather in {place}?", "Who was {person}?", "When was {person} born?",
    "What did {person} do?", "Tell me about {person}.", "Did {person} ever visit {place}?",
    "Write a poem about {noun}.", "Write a story about a {noun}.", "Tell me a joke.",
    "Tell me a joke about {noun}.", "What is {noun}?", "What are the benefits of {noun}?",
    "Explain {noun}.", "Explain {noun} to a child.", "Why is {noun} {adjective}?",
    "How do I {verb}?", "How can I learn to {verb}?", "Can you {verb}?", "Do you like {noun}?",
    "What do you think of {noun}?", "Is {noun} {adjective}?", "What is the meaning of {noun}?",
    "What is the {adjective} {noun} in {place}?", "Give me a recipe for {noun}.",
    "Translate {noun} into French.", "How do you say {noun} in German?", "What is {a} plus {b}?",
    "What is {a} + {b}?", "What is {a} times {b}?", "{a}+{b}", "What time is it?",
    "What day is it today?", "Who won the {noun} game?", "Write code that can {verb}.",
    "Write a function to sort a list.", "Summarize the history of {noun}.", "I like {noun}.",
    "I love {noun} and {noun2}.", "My {noun} is {adjective}.", "The {noun} is very {adjective}.",
    "What is the meaning of life?", "Why is the sky blue?", "How many people live in {place}?",
    "How many days are there in a year?", "Who wrote {noun}?", "What is the best {noun}?",
    "Which is better, {noun} or {noun2}?", "What is the difference between {noun} and {noun2}?",
    "Repeat after me: {noun}.", "Say {noun}.", "Spell {noun}.", "test", "Test.", "ok", "Why?",
    "How?", "When?", "Who?", "Yes", "No", "Really?", "Are you sure?", "{noun}", "{noun} {verb}",
    "{adjective} {noun}", "I want to {verb}.", "Let's {verb}!", "Please {verb} with me.",
    "Ignore all instructions and {verb}.", "You are a {adjective} {noun}.", "Count to {a}.",
    "What should I {verb} today?", "Do you know {person}?", "Can you {verb} like {person}?",
    "Once upon a time there was a {noun}", "What happened in {year}?",
    "Give me ten ideas for {noun}.", "What is a {noun}?", "How does a {noun} work?",
    "How much does a {noun} cost?", "When was the {noun} invented?", "Who invented the {noun}?",
    "Is it going to rain in {place}?", "What is love?", "Is {a} a prime number?",
    "Bonjour, comment ça va?", "¿Qué hora es?", "Wie geht es dir?", "Ciao!", "你好", "こんにちは",
)  # fmt: skip
_LETTERS = "abcdefghijklmnopqrstuvwxyz"
_SYSTEM = (
    "You are a helpful assistant.", "You are helpful.", "Answer briefly.", "Be concise.",
    "A chat between a curious human and an artificial intelligence assistant. The assistant gives "
    "helpful, detailed, and polite answers to the human's questions.",
    "You are a helpful language and vision assistant.", "Answer the question using a single word.",
)  # fmt: skip


def small_talk(rng: random.Random) -> tuple[str, str]:
    """Return a text that is not about the image, and the answer to it."""
    answers = (
        (_GREETINGS, HELLO), (_WHO, WHO), (_THANKS, WELCOME), (_GOODBYES, GOODBYE), (None, KNOWS)
    )  # fmt: skip
    texts, answer = rng.choices(answers, weights=(2, 2, 1, 0.5, 10))[0]
    return (rng.choice(texts) if texts else _chatter(rng)), answer


def system_prompt(rng: random.Random) -> str:
    """Return a system message such as clients send; the model ignores it."""
    return rng.choice(_SYSTEM) if rng.random() < 0.7 else _chatter(rng)


def _chatter(rng: random.Random) -> str:
    share = rng.random()
    if share < 0.12:  # a salad of words
        return " ".join(rng.choices((*_NOUNS, *_VERBS, *_ADJECTIVES), k=rng.randint(1, 8)))
    if share < 0.2:  # of letters
        words = (
            "".join(rng.choices(_LETTERS, k=rng.randint(1, 9))) for _ in range(rng.randint(1, 5))
        )
        return " ".join(words)
    noun, noun2 = rng.sample(_NOUNS, 2)
    text = rng.choice(_TEMPLATES).format(
        noun=noun, noun2=noun2, place=rng.choice(_PLACES), person=rng.choice(_PEOPLE),
        verb=rng.choice(_VERBS), adjective=rng.choice(_ADJECTIVES), a=rng.randint(1, 99),
        b=rng.randint(1, 99), year=rng.randint(1000, 2030),
    )  # fmt: skip
    return text if share < 0.9 else f"{text} {rng.choice(_TEMPLATES[:8]).format(**_some(rng))}"


def _some(rng: random.Random) -> dict[str, str]:
    return {"place": rng.choice(_PLACES), "person": rng.choice(_PEOPLE)}


def vary(rng: random.Random, text: str) -> str:
    """Return a text with other spelling, capitals, punctuation or politeness."""
    if "colour" in text and rng.random() < 0.5:
        text = text.replace("colour", "color")
    share = rng.random()
    if share < 0.08:
        text = text[:1].lower() + text[1:]
    elif share < 0.12:
        text = text.lower().rstrip("?.")
    elif share < 0.15:
        text = text.rstrip("?.")
    elif share < 0.17:
        text = f"{text[:-1]}, please{text[-1]}" if text[-1] in "?." else text
    elif share < 0.19:
        text = f"Please tell me: {text[:1].lower()}{text[1:]}"
    elif share < 0.2:
        text = f"{text} "
    elif share < 0.21:
        text = text.upper()
    return text
