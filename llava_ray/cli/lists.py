"""`llava-ray recipes | templates`: what can be named in settings."""

from typing import Annotated

import typer
from rich.table import Table

from llava_ray.cli.console import out
from llava_ray.errors import ConfigError
from llava_ray.recipes import find_recipe, list_deepspeed_files, list_recipes


def recipes(
    name: Annotated[
        str | None,
        typer.Argument(
            metavar="NAME", show_default=False, help="Print this recipe, to be saved and changed."
        ),
    ] = None,
) -> None:
    """List the recipes that `train` takes by name, or print one of them.

    llava-ray recipes finetune_lora > mine.yaml
    """
    if name is not None:
        print(find_recipe(name).read_text(encoding="utf-8"), end="")
        return
    table = Table("recipe", "what it trains")
    for recipe in list_recipes():
        table.add_row(recipe.name, recipe.summary)
    out.print(table)
    out.print(f"DeepSpeed files, for deepspeed=NAME: {', '.join(list_deepspeed_files())}")


def templates(
    name: Annotated[
        str | None,
        typer.Argument(
            metavar="NAME", show_default=False, help="Print a conversation in this template."
        ),
    ] = None,
) -> None:
    """List the conversation templates, or print an example of one of them."""
    from llava_ray.template import OTHER_NAMES, TEMPLATES, find_template
    from llava_ray.types import IMAGE, Message, TextPart

    if name is not None:
        conversation = (
            Message("user", (IMAGE, TextPart("What is this?"))),
            Message("assistant", (TextPart("A cat."),)),
        )
        try:
            text = find_template(name).render(conversation, add_generation_prompt=False)
        except LookupError as error:
            raise ConfigError(f"{name!r} writes no conversation: {error}") from error
        out.print(text, markup=False)
        return
    table = Table("template", "other names", "user / assistant", "an answer ends with")
    for template in TEMPLATES.values():
        others = [other for other, known in OTHER_NAMES.items() if known == template.name]
        roles = " / ".join(role.strip() for role in template.roles)
        table.add_row(template.name, ", ".join(others), roles, repr(template.end))
    out.print(table)
