"""Messages in any order -> turns that every chat template takes.

Templates take at most one system message, first, and then user and assistant in turn, beginning
with the user; LLaVA has only learned images of the user. So:

    system messages        those at the beginning become one; later ones are part of the user's
                           turn; if there are no others, they are the user's
    one role twice         one turn, joined by a line break; empty messages are left out of it
    the assistant begins   an empty turn of the user comes before
    images elsewhere       are shown in the user's next turn, or in the last one if none follows
    the assistant ends     the turn is to be continued; an empty one is to be written anew
"""

from collections.abc import Iterable, Sequence

from llava_ray.types import ImagePart, Message, TextPart

Part = TextPart | ImagePart


def arrange_turns(messages: Sequence[Message]) -> tuple[Message, ...]:
    """Return a conversation's turns; the last is the user's, or the assistant's to continue."""
    roles = [message.role for message in messages]
    num_leading = next((i for i, role in enumerate(roles) if role != "system"), len(roles))
    if num_leading == len(messages):
        return _join([Message("user", message.parts) for message in messages])
    system, said = messages[:num_leading], messages[num_leading:]
    turns = [
        Message("user" if message.role == "system" else message.role, message.parts)
        for message in said
    ]
    if turns[0].role == "assistant":
        turns.insert(0, Message("user", ()))
    arranged = list(_move_images(_join([*system, *turns])))
    if arranged[-1].role == "assistant" and is_blank(arranged[-1].parts):
        arranged.pop()
    return tuple(turn for turn in arranged if turn.role != "system" or turn.parts)


def is_blank(parts: Iterable[Part]) -> bool:
    """Whether parts have neither an image nor any text but white space."""
    return not any(isinstance(part, ImagePart) or part.text.strip() for part in parts)


def _join(messages: Iterable[Message]) -> tuple[Message, ...]:
    """Join consecutive messages of one role."""
    turns: list[Message] = []
    for message in messages:
        if not turns or turns[-1].role != message.role:
            turns.append(message)
        elif not turns[-1].parts:
            turns[-1] = message
        elif not is_blank(message.parts):
            parts = (*turns[-1].parts, TextPart("\n"), *message.parts)
            turns[-1] = Message(message.role, parts)
    return tuple(turns)


def _move_images(turns: Sequence[Message]) -> tuple[Message, ...]:
    """Move the images of system and assistant to turns of the user."""
    moved: list[Message] = []
    waiting: tuple[Part, ...] = ()
    for turn in turns:
        if turn.role == "user":
            moved.append(Message("user", (*waiting, *turn.parts)))
            waiting = ()
            continue
        waiting += tuple(part for part in turn.parts if isinstance(part, ImagePart))
        texts = tuple(part for part in turn.parts if isinstance(part, TextPart))
        moved.append(Message(turn.role, texts))
    if waiting:
        last = max(i for i, turn in enumerate(moved) if turn.role == "user")
        moved[last] = Message("user", (*moved[last].parts, *waiting))
    return tuple(moved)
