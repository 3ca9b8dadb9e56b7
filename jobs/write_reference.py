"""The reference pages in docs/reference: every setting, every command, every field of a request.

`python jobs/write_reference.py` writes them from the pydantic sections in `llava_ray.config`, from
the command tree of `llava_ray.cli` and from the table of fields in `llava_ray.serve.openai`. With
`--check` it writes nothing, and fails when a page differs from what it would write.
"""

import inspect
import json
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_origin

import typer
from pydantic import BaseModel
from typer.main import get_command

from llava_ray import config
from llava_ray.cli import app as command_line
from llava_ray.serve.openai.fields import CHAT_RULES, COMPLETION_RULES, TOKENIZE_RULES, Rule
from llava_ray.serve.openai.protocol import (
    ChatBody,
    CompletionBody,
    DetokenizeBody,
    OpenBody,
    TokenizeBody,
)

FOLDER = Path(__file__).parents[1] / "docs" / "reference"
NOTICE = "<!-- Written by `python jobs/write_reference.py`; edit the code that it reads. -->"


@dataclass(frozen=True)
class SettingsPage:
    """A page of settings: its file, heading, introduction and sections, in order."""

    file: str
    title: str
    introduction: str
    sections: tuple[type[BaseModel], ...]


PAGES = (
    SettingsPage(
        "settings-serve.md",
        "Settings of the server",
        "The fields of `ServeConfig`, for `llava-ray serve`, for "
        "`serve run llava_ray.app:build_app key=value` and for `args` in a Serve config file. "
        "Every field can also be set by an environment variable, `LLAVA_RAY_` and its name in "
        "capitals; two underscores lead to a nested field: `LLAVA_RAY_LIMITS__MAX_IMAGES=4`. "
        "Arguments and files win over the environment.",
        (
            config.ServeConfig,
            config.LimitsConfig,
            config.FetchConfig,
            config.KeyConfig,
            config.LlavaProtocolConfig,
            config.ModerationConfig,
            config.PageConfig,
        ),
    ),
    SettingsPage(
        "settings-model.md",
        "Settings of a served model",
        "The fields of `ModelConfig`: one entry of `models` in the settings of the server.",
        (config.ModelConfig,),
    ),
    SettingsPage(
        "settings-train.md",
        "Settings of a training run",
        "The fields of `TrainConfig`: the keys of a recipe, and of `key=value` after "
        "`llava-ray train`.",
        (
            config.TrainConfig,
            config.DataConfig,
            config.DatasetConfig,
            config.BenchmarksConfig,
        ),
    ),
    SettingsPage(
        "settings-evaluate.md",
        "Settings of an evaluation",
        "The fields of `EvaluateConfig`, for `llava-ray evaluate` and `jobs/evaluate.py`.",
        (config.EvaluateConfig,),
    ),
    SettingsPage(
        "settings-convert.md",
        "Settings of a conversion",
        "The fields of `ConvertConfig`, for `llava-ray convert` and `jobs/convert.py`.",
        (config.ConvertConfig,),
    ),
)


def main(
    check: Annotated[
        bool, typer.Option("--check", help="Write nothing; fail when a page is stale.")
    ] = False,
) -> None:
    """Write the reference pages in docs/reference."""
    pages = write_pages()
    if not check:
        FOLDER.mkdir(parents=True, exist_ok=True)
        for name, text in pages.items():
            (FOLDER / name).write_text(text, encoding="utf-8")
    if stale := find_stale(pages):
        print(f"stale: {', '.join(stale)}; run python jobs/write_reference.py", file=sys.stderr)
        raise typer.Exit(1)


def write_pages() -> dict[str, str]:
    """Return the text of each reference page, by file name."""
    pages = {page.file: _write_settings(page) for page in PAGES}
    pages["commands.md"] = _write_commands()
    pages["request-fields.md"] = _write_fields()
    pages["README.md"] = _write_index()
    return pages


def find_stale(pages: dict[str, str]) -> list[str]:
    """Return the files in docs/reference that differ from `pages`, are missing, or are extra."""
    stored = {path.name: path.read_text(encoding="utf-8") for path in FOLDER.glob("*.md")}
    return sorted(name for name in stored | pages if stored.get(name) != pages.get(name))


def _write_index() -> str:
    lines = [NOTICE, "# Reference", ""]
    lines += [f"- [{page.title}]({page.file})" for page in PAGES]
    lines += ["- [Commands](commands.md)", "- [Fields of requests](request-fields.md)", ""]
    return "\n".join(lines)


def _write_settings(page: SettingsPage) -> str:
    lines = [NOTICE, f"# {page.title}", "", page.introduction, ""]
    for section in page.sections:
        lines += [f"## {section.__name__}", "", _first_paragraph(section.__doc__), ""]
        lines += ["| setting | type | default | |", "|---|---|---|---|"]
        lines += [_write_field(section, name) for name in section.model_fields]
        lines += [
            f"\n`{old}` is an older name of `{new}`, which still works with a warning."
            for old, new in getattr(section, "renamed", {}).items()
        ]
        lines.append("")
    return "\n".join(lines)


def _write_field(section: type[BaseModel], name: str) -> str:
    schema = section.model_json_schema()
    described = schema["properties"][name]
    field = section.model_fields[name]
    row = (
        f"`{name}`",
        _describe_type(described, _here(section)),
        _describe_default(field.is_required(), field.get_default(call_default_factory=True)),
        field.description or "",
    )
    return f"| {' | '.join(_escape(cell) for cell in row)} |"


BODIES: tuple[tuple[str, str, type[OpenBody], Mapping[str, Rule]], ...] = (
    ("Chats", "POST /v1/chat/completions", ChatBody, CHAT_RULES),
    ("Completions", "POST /v1/completions", CompletionBody, COMPLETION_RULES),
    ("Tokenize", "POST /tokenize", TokenizeBody, TOKENIZE_RULES),
    ("Detokenize", "POST /detokenize", DetokenizeBody, TOKENIZE_RULES),
)


def _write_fields() -> str:
    lines = [
        NOTICE,
        "# Fields of requests",
        "",
        "What happens to each field. Null is accepted everywhere and asks for nothing. A field "
        "that is not listed is passed over, or refused, as the setting "
        "[`limits.unknown_fields`](settings-serve.md#limitsconfig) says. The header "
        "`x-llava-ray-ignored` of a response names the fields that were passed over.",
        "",
    ]
    for title, route, body, rules in BODIES:
        lines += [f"## {title}", "", f"`{route}`", "", "| field | |", "|---|---|"]
        lines += [
            f"| `{name}` | {_escape(field.description or '')} |"
            for name, field in body.model_fields.items()
        ]
        lines += [f"| `{name}` | {_escape(_describe_rule(rule))} |" for name, rule in rules.items()]
        lines.append("")
    return "\n".join(lines)


def _describe_rule(rule: Rule) -> str:
    if rule.neutral is None:
        return f"Passed over: {rule.note}."
    values = ", ".join(f"`{json.dumps(value)}`" for value in rule.neutral)
    return f"{f'Accepts only {values}. Otherwise' if values else 'Not supported'}: {rule.note}."


def _here(section: type[BaseModel]) -> Callable[[str], str]:
    """Return a function that links to other sections from the page that contains `section`."""
    files = {each.__name__: page.file for page in PAGES for each in page.sections}

    def link(name: str) -> str:
        file = files[name]
        page = "" if file == files[section.__name__] else file
        return f"[{name}]({page}#{name.lower()})"

    return link


def _describe_type(schema: dict[str, Any], link: Callable[[str], str]) -> str:
    """Describe a type from its JSON schema, including bounds."""
    if "$ref" in schema:
        return link(schema["$ref"].rpartition("/")[2])
    if "anyOf" in schema:
        kinds = [each for each in schema["anyOf"] if each.get("type") != "null"]
        return " or ".join(dict.fromkeys(_describe_type(each, link) for each in kinds))
    if "const" in schema or "enum" in schema:
        return ", ".join(f"`{value}`" for value in schema.get("enum", [schema.get("const")]))
    if schema.get("type") == "array":
        return f"list of {_describe_type(schema['items'], link)}"
    if schema.get("type") == "object":
        values = schema.get("additionalProperties")
        of = f" to {_describe_type(values, link)}" if isinstance(values, dict) else ""
        return f"mapping of names{of}"
    names = {"integer": "integer", "number": "number", "boolean": "true or false"}
    name = "network" if "ipv" in schema.get("format", "") else names.get(schema.get("type", ""))
    return " ".join(
        [name or ("text" if schema.get("type") == "string" else "anything"), *_bounds(schema)]
    )


def _bounds(schema: dict[str, Any]) -> Iterator[str]:
    signs = {"minimum": "≥", "exclusiveMinimum": ">", "maximum": "≤", "exclusiveMaximum": "<"}
    found = [f"{sign} {_number(schema[key])}" for key, sign in signs.items() if key in schema]
    if found:
        yield ", ".join(found)


def _number(value: float) -> str:
    return f"{int(value):,}" if value == int(value) else f"{value:g}"


def _describe_default(is_required: bool, value: Any) -> str:
    if is_required:
        return "required"
    if isinstance(value, BaseModel):
        return "its defaults"
    if value is None or str(value) == "":
        return ""
    if isinstance(value, bool):
        return f"`{str(value).lower()}`"
    if isinstance(value, int):
        return f"`{value:_}`" if value > 9999 else f"`{value}`"
    return f"`{value}`"


def _write_commands() -> str:
    lines = [
        NOTICE,
        "# Commands",
        "",
        "What `llava-ray COMMAND --help` prints, for every command.",
        "",
    ]
    for words, command in _walk(("llava-ray",), get_command(command_line)):
        usage = " ".join(["llava-ray", *words[1:], *_usage(command)])
        lines += [f"{'#' * min(len(words) + 1, 4)} {' '.join(words)}", ""]
        lines += [f"`{usage}`", "", _paragraphs(command.help), ""]
        rows = [_write_parameter(each) for each in command.params if not _is_hidden(each)]
        if rows:
            lines += ["| | type | default | |", "|---|---|---|---|", *rows, ""]
    return "\n".join(lines)


def _walk(words: tuple[str, ...], command: Any) -> Iterator[tuple[tuple[str, ...], Any]]:
    """Yield a command and its subcommands, each with the words that call it."""
    yield words, command
    for name, below in getattr(command, "commands", {}).items():
        if not below.hidden:
            yield from _walk((*words, name), below)


def _is_hidden(parameter: Any) -> bool:
    return getattr(parameter, "hidden", False)


def _is_option(parameter: Any) -> bool:
    return any(name.startswith("-") for name in parameter.opts)


def _usage(command: Any) -> Iterator[str]:
    if any(_is_option(each) for each in command.params):
        yield "[OPTIONS]"
    for each in command.params:
        if not _is_option(each):
            shown = _argument(each)
            yield shown if each.required or shown.startswith("[") else f"[{shown}]"
    if getattr(command, "commands", None):
        yield "COMMAND" if not command.invoke_without_command else "[COMMAND]"


def _argument(parameter: Any) -> str:
    dots = "..." if parameter.nargs == -1 else ""
    return parameter.metavar or f"{parameter.name.upper()}{dots}"


def _write_parameter(parameter: Any) -> str:
    is_option = _is_option(parameter)
    names = [*parameter.opts, *parameter.secondary_opts] if is_option else [_argument(parameter)]
    default = parameter.default
    if callable(default) or default is False or not isinstance(default, object):
        default = None
    row = (
        ", ".join(f"`{name}`" for name in names),
        _describe_annotation(parameter),
        _describe_default(parameter.required, default),
        _paragraphs(parameter.help).replace("\n", " "),
    )
    return f"| {' | '.join(_escape(cell) for cell in row)} |"


def _describe_annotation(parameter: Any) -> str:
    annotation = parameter.type_descriptor.annotation
    names = {bool: "", int: "integer", float: "number", str: "text", Path: "path"}
    if get_origin(annotation) is Literal:
        return ", ".join(f"`{value}`" for value in get_args(annotation))
    if get_origin(annotation) is list:
        annotation = get_args(annotation)[0]
    ends = {"minimum": parameter.min, "maximum": parameter.max}
    bounds = _bounds({key: value for key, value in ends.items() if value is not None})
    return " ".join([names.get(annotation, "text"), *bounds])


def _first_paragraph(text: str | None) -> str:
    return _paragraphs(text).split("\n\n")[0]


def _paragraphs(text: str | None) -> str:
    """Return a docstring with one line for each paragraph."""
    paragraphs = inspect.cleandoc(text or "").split("\n\n")
    return "\n\n".join(" ".join(each.split()) for each in paragraphs)


def _escape(cell: str) -> str:
    return cell.replace("|", "\\|").replace("*", "\\*")


if __name__ == "__main__":
    typer.run(main)
