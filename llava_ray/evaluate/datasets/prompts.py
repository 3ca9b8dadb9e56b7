"""What is asked in a prompt, without the instructions around it: two prompts are compared."""

import re

from llava_ray.data.sources.building import LETTER_ANSWER, SHORT_ANSWER

LETTER_CN = "\n请直接回答选项字母。"
_INSTRUCTIONS = (
    "When the provided information is insufficient, respond with 'Unanswerable'.",
    SHORT_ANSWER,
    LETTER_ANSWER,
    LETTER_CN.strip(),
    "Please answer yes or no.",
    "<image>",
)
_SHORT_ANSWER_PROMPT = re.compile(r"OCR tokens: .*?Question: (.*?) Short answer:", re.DOTALL)


def is_same_question(text: str, prompt: str) -> bool:
    """Return whether a prompt asks this question, whatever instructions each of them has."""
    if not prompt.strip():
        return False
    question, asked = extract_question(text), extract_question(prompt)
    return asked in (question, question.split("\n")[0])


def extract_question(prompt: str) -> str:
    """Return the question in a prompt: in lower case, without instructions and OCR tokens."""
    if match := _SHORT_ANSWER_PROMPT.match(prompt):
        prompt = match[1]
    for instruction in _INSTRUCTIONS:
        prompt = prompt.replace(instruction, "")
    lines = (" ".join(line.split()) for line in prompt.lower().split("\n"))
    return "\n".join(each for each in lines if each and not each.startswith("reference ocr token"))
