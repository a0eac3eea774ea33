"""A settings class -> command line, TOML file and --help; the class is the only list of names."""

import argparse
import difflib
import json
import tomllib
import types
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin

from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from batchcls.errors import InputError
from batchcls.storage.uris import local_path, normal

Settings = TypeVar("Settings", bound=BaseModel)


class _Parser(argparse.ArgumentParser):
    """A parser whose complaints end with exit code 2 and one line, as every other bad input does."""

    def error(self, message: str) -> Any:
        raise InputError(f"{message}; see {self.prog} --help")


def add_settings(
    parser: argparse.ArgumentParser, settings: type[BaseModel], positional: Sequence[str] = ()
) -> None:
    """Add one flag per field of `settings` to the parser, and --config FILE.toml."""
    parser.add_argument("--config", metavar="FILE.toml", help="Read settings from a TOML file; flags win.")
    for name, field in _own_fields_first(settings):
        options: dict[str, Any] = {"help": _help(field), "default": argparse.SUPPRESS}
        if name in positional:
            parser.add_argument(name, metavar=name.upper(), nargs="?", **options)
            continue
        flag = "--" + name.replace("_", "-")
        if field.annotation is bool:
            parser.add_argument(flag, dest=name, action=argparse.BooleanOptionalAction, **options)
        elif get_origin(field.annotation) is list:
            parser.add_argument(flag, dest=name, action="append", metavar="A,B", **options)
        else:
            parser.add_argument(flag, dest=name, metavar=_metavar(field.annotation, name), **options)


def _own_fields_first(settings: type[BaseModel]) -> list[tuple[str, FieldInfo]]:
    """A class's own settings before those it shares with other jobs, as a reader of --help looks for them."""
    fields = settings.model_fields
    return sorted(fields.items(), key=lambda item: item[0] not in settings.__annotations__)


def read_settings(settings: type[Settings], namespace: argparse.Namespace) -> Settings:
    """Join the TOML file and the flags into one checked object.

    Raises:
        InputError: a setting is unknown, missing or out of range; every one is named.
    """
    given = dict(vars(namespace))
    path = given.pop("config", None)
    values = _read_toml(Path(local_path(normal(path))), settings) if path else {}
    values.update(
        {k: _parse(v, settings.model_fields[k]) for k, v in given.items() if k in settings.model_fields}
    )
    try:
        return settings.model_validate(values)
    except ValidationError as error:
        raise InputError("; ".join(_complaints(error, settings))) from None


def parser_for(prog: str, description: str, examples: str) -> argparse.ArgumentParser:
    """An argument parser whose help ends with examples that can be copied."""
    return _Parser(
        prog=prog,
        description=description,
        epilog=examples,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )


def _read_toml(path: Path, settings: type[BaseModel]) -> dict[str, Any]:
    try:
        values = tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(f"--config {path}: there is no such file") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, OSError) as error:
        raise InputError(f"--config {path}: {error}") from None
    tables: Mapping[str, str] = getattr(settings, "toml_tables", {})
    for table, prefix in tables.items():
        if isinstance(values.get(table), dict):
            values |= {prefix + name: value for name, value in values.pop(table).items()}
    values = {name.replace("-", "_"): value for name, value in values.items()}
    for name in values:
        if name not in settings.model_fields:
            close = difflib.get_close_matches(name, settings.model_fields, n=1)
            hint = f"; did you mean {close[0]}?" if close else ""
            raise InputError(f"--config {path}: unknown setting {name}{hint}")
    return values


def _parse(value: Any, field: FieldInfo) -> Any:
    """Text of the command line -> what pydantic can check: JSON for objects, commas for lists."""
    origin = get_origin(field.annotation)
    if origin is list:
        return [part for item in value for part in item.split(",") if part]
    if origin is dict:
        try:
            return json.loads(value)
        except json.JSONDecodeError as error:
            raise InputError(
                f"a JSON object is expected, for example '{{\"anon\": true}}': {error.msg}"
            ) from None
    if any(get_origin(kind) is tuple for kind in alternatives(field.annotation)):
        return tuple(value.split(","))
    return value


def _complaints(error: ValidationError, settings: type[BaseModel]) -> list[str]:
    """One line a setting; of a setting that may be several things, what each of them would have to be."""
    found: dict[str, list[str]] = {}
    for item in error.errors(include_url=False, include_input=False, include_context=False):
        message = "is required" if item["type"] == "missing" else item["msg"].removeprefix("Value error, ")
        # Without a place it is about several settings, which the message names.
        name = str(item["loc"][0]) if item["loc"] else ""
        found.setdefault(name, []).append(message.removeprefix("Input "))
    lines = []
    for name, messages in found.items():
        flag = "--" + name.replace("_", "-")
        field = settings.model_fields.get(name)
        if not name:
            lines += messages
        elif messages == ["is required"]:
            lines.append(f"{flag} is required")
        elif field is not None and len(alternatives(field.annotation)) > 1:
            lines.append(f"{flag}: {' or '.join(dict.fromkeys(messages))}".replace(" or should be ", " or "))
        else:
            lines.append(f"{flag}: {messages[0]}")
    return lines


def alternatives(annotation: Any) -> list[Any]:
    """Flatten `A | B`, `Annotated[...]` and aliases into the plain alternatives."""
    if get_origin(annotation) is Annotated:
        return alternatives(get_args(annotation)[0])
    if get_origin(annotation) in (Union, types.UnionType):
        return [kind for arm in get_args(annotation) for kind in alternatives(arm)]
    return [annotation]


_METAVARS: Mapping[Any, str] = {int: "N", float: "X", str: "TEXT"}


def _metavar(annotation: Any, name: str) -> str:
    words: list[str] = []
    for kind in alternatives(annotation):
        if get_origin(kind) is Literal:
            words += [str(choice) for choice in get_args(kind)]
        elif get_origin(kind) is dict:
            words.append("JSON")
        elif get_origin(kind) is tuple:
            words.append("A,B,C")
        elif kind in (int, float) or (kind is str and name not in _PLACES):
            words.append(_METAVARS[kind])
        elif kind is str:
            words.append("URI")
    return "|".join(dict.fromkeys(words))


_PLACES = frozenset({"manifest", "output", "weights", "labels", "folder", "bundle"})


def _help(field: FieldInfo) -> str:
    text = (field.description or "").replace("%", "%%")
    if field.is_required():
        return f"{text} Required."
    default = field.get_default(call_default_factory=True)
    if default is PydanticUndefined or default is None or default in ([], {}):
        return text
    if isinstance(default, list):
        default = ",".join(map(str, default))
    shown = {True: "yes", False: "no"}[default] if isinstance(default, bool) else default
    return f"{text} [{shown}]"
