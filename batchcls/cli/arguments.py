"""A settings class -> command line, TOML file and --help; the class is the only list of names."""

import argparse
import difflib
import json
import re
import sys
import tomllib
import types
from collections.abc import Callable, Iterable, Mapping, Sequence
from enum import Enum
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin

from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from batchcls import __version__
from batchcls.errors import InputError
from batchcls.storage.uris import local_path, normalize_uri

Settings = TypeVar("Settings", bound=BaseModel)


class _Parser(argparse.ArgumentParser):
    """A parser that reports errors as `InputError`, and whose `--help` can be limited to the essential flags.

    Every parser accepts `--help-all` and `--version`; its help lists them only where they show more than `--help`.
    """

    def __init__(self, **options: Any) -> None:
        # --help is replaced where the flags are in groups
        super().__init__(allow_abbrev=False, conflict_handler="resolve", **options)
        hidden: dict[str, Any] = {"dest": "help", "default": argparse.SUPPRESS, "help": argparse.SUPPRESS}
        self.add_argument("--help-all", action="help", **hidden)
        self.add_argument("--version", action="version", version=f"batchcls {__version__}", **hidden)

    def error(self, message: str) -> Any:
        raise InputError(f"{message}; see {self.prog} --help")

    def parse_known_args(  # type: ignore[override]
        self, args: Sequence[str] | None = None, namespace: argparse.Namespace | None = None
    ) -> tuple[argparse.Namespace, list[str]]:
        """Reject unknown arguments here, where the flags of a sub-command can be suggested."""
        parsed, unknown = super().parse_known_args(args, namespace)
        if unknown:
            flags = [item.partition("=")[0] for item in unknown if item.startswith("-")] or unknown
            named = [flag + suggestion(flag, self._option_string_actions) for flag in flags]
            self.error("; ".join(f"unrecognized argument {flag}" for flag in named))
        return parsed, []

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        """Suggest a command for an unknown one."""
        if isinstance(action, argparse._SubParsersAction) and value not in action.choices:
            self.error(f"unknown command {value}{suggestion(value, action.choices)}")
        super()._check_value(action, value)

    def format_essential_help(self) -> str:
        """The help with the first sentence of each essential flag, and the names of the groups of `--help-all`."""
        titles = [f"{group.title} ({len(group._group_actions)})" for group in self._action_groups[2:]]
        texts = [action.help for action in self._actions]
        epilog = self.epilog
        for action in self._actions:
            is_essential = getattr(action, "essential", True)
            action.help = _first_sentence(action.help or "") if is_essential else argparse.SUPPRESS
        self.epilog = f"--help-all shows every flag: {', '.join(titles)}.\n\n{epilog or ''}"
        try:
            return self.format_help()
        finally:
            self.epilog = epilog
            for action, text in zip(self._actions, texts, strict=True):
                action.help = text


def suggestion(name: str, known: Iterable[str]) -> str:
    """The end of an error message about an unknown name: the known name closest to it, or nothing."""
    close = difflib.get_close_matches(name, known, n=1)
    return f"; did you mean {close[0]}?" if close else ""


def _first_sentence(text: str) -> str:
    """The first sentence of a help text, and whether the flag is required or its default."""
    sentence, end, rest = text.partition(". ")
    found = re.search(r"(Required\.|\[[^\]]*\])$", rest)
    return f"{sentence}{end.rstrip()} {found.group()}".rstrip() if found else sentence + end.rstrip()


class _HelpAction(argparse.Action):
    """Print the help, whole with `--help-all`."""

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: object,  # noqa: ARG002 - the signature of argparse
        values: object,  # noqa: ARG002
        option_string: str | None = None,
    ) -> None:
        if option_string != "--help-all" and isinstance(parser, _Parser):
            text = parser.format_essential_help()
        else:
            text = parser.format_help()
        parser._print_message(text, sys.stdout)
        parser.exit()


def add_settings(
    parser: argparse.ArgumentParser, settings: type[BaseModel], positional: Sequence[str] = ()
) -> None:
    """Add one flag per field of `settings` to the parser, in the groups of their markers, and --config FILE.toml."""
    parser.add_argument("--config", metavar="FILE.toml", help="Read settings from a TOML file; flags win.")
    groups: dict[str, argparse._ArgumentGroup] = {}
    has_essential = any(_marker(field).get("essential") for field in settings.model_fields.values())
    if has_essential:
        _limit_help(parser)
    for name, field in _own_fields_first(settings):
        options: dict[str, Any] = {"help": _help(field), "default": argparse.SUPPRESS}
        if name in positional:
            parser.add_argument(name, metavar=name.upper(), nargs="?", **options)
            continue
        title = _marker(field).get("group")
        target: argparse._ActionsContainer = parser
        if title:
            target = groups.get(title) or groups.setdefault(title, parser.add_argument_group(title))
        flag = flag_of(name)
        if field.annotation is bool:
            action = target.add_argument(flag, dest=name, action=argparse.BooleanOptionalAction, **options)
        elif get_origin(field.annotation) is list:
            metavar = _metavar(get_args(field.annotation)[0], name) if _is_repeated(field) else "A,B"
            action = target.add_argument(flag, dest=name, action="append", metavar=metavar, **options)
        else:
            action = target.add_argument(flag, dest=name, metavar=_metavar(field.annotation, name), **options)
        if has_essential:
            vars(action)["essential"] = bool(_marker(field).get("essential"))


def _marker(field: FieldInfo) -> Mapping[str, Any]:
    return field.json_schema_extra if isinstance(field.json_schema_extra, dict) else {}


def _is_repeated(field: FieldInfo) -> bool:
    return bool(_marker(field).get("repeated"))


def _limit_help(parser: argparse.ArgumentParser) -> None:
    parser.usage = f"{parser.prog} [OPTIONS]"
    parser.add_argument(
        *("-h", "--help", "--help-all"),
        action=_HelpAction,
        nargs=0,
        dest="help",
        default=argparse.SUPPRESS,
        help="Show the essential flags, or all of them by group, and exit.",
    )


def _own_fields_first(settings: type[BaseModel]) -> list[tuple[str, FieldInfo]]:
    """Essential settings first, then a class's own, then those it shares with other jobs."""
    fields = settings.model_fields
    return sorted(
        fields.items(),
        key=lambda item: (not _marker(item[1]).get("essential"), item[0] not in settings.__annotations__),
    )


def read_settings(settings: type[Settings], namespace: argparse.Namespace) -> Settings:
    """Merge the TOML file and the flags, which take precedence, into validated settings.

    Raises:
        InputError: a setting is unknown, missing or out of range; every one is named.
    """
    given = dict(vars(namespace))
    path = given.pop("config", None)
    values = _read_toml(Path(local_path(normalize_uri(path))), settings) if path else {}
    values.update(
        {k: _parse(v, settings.model_fields[k]) for k, v in given.items() if k in settings.model_fields}
    )
    return validate_settings(settings, values)


def flag_of(name: str) -> str:
    """The flag of a setting."""
    return "--" + name.replace("_", "-")


def validate_settings(
    settings: type[Settings], values: Mapping[str, Any], *, name: Callable[[str], str] = flag_of
) -> Settings:
    """Validate the values of settings.

    Args:
        settings: class of the settings.
        values: by name.
        name: how errors name a setting; default: by its flag.

    Raises:
        InputError: a setting is unknown, missing or out of range; every one is named.
    """
    _require_known(values, settings, "")
    try:
        return settings.model_validate(dict(values))
    except ValidationError as error:
        raise InputError("; ".join(_messages(error, settings, name))) from None


def _require_known(values: Iterable[str], settings: type[BaseModel], source: str) -> None:
    for name in values:
        if name not in settings.model_fields:
            raise InputError(f"{source}unknown setting {name}{suggestion(name, settings.model_fields)}")


def parser_for(prog: str, description: str, examples: str) -> argparse.ArgumentParser:
    """An argument parser whose help ends with examples that can be copied."""
    return _Parser(
        prog=prog,
        description=description,
        epilog=examples,
        formatter_class=argparse.RawDescriptionHelpFormatter,
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
    _require_known(values, settings, f"--config {path}: ")
    return values


def _parse(value: Any, field: FieldInfo) -> Any:
    """Text of the command line -> what pydantic can check: JSON for objects, commas for most lists."""
    origin = get_origin(field.annotation)
    if _is_repeated(field):
        return value
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


def _messages(error: ValidationError, settings: type[BaseModel], name_of: Callable[[str], str]) -> list[str]:
    """One message per setting; for a setting of several types, it lists what each of them requires."""
    found: dict[str, list[str]] = {}
    for item in error.errors(include_url=False, include_input=False, include_context=False):
        message = "is required" if item["type"] == "missing" else item["msg"].removeprefix("Value error, ")
        # An error without a location is about several settings, which the message names.
        name = str(item["loc"][0]) if item["loc"] else ""
        message = message.removeprefix("Input ")
        field = settings.model_fields.get(name)
        if field is not None and get_origin(field.annotation) is dict and len(item["loc"]) > 1:
            message = _entry_message(item["loc"], message, field)
        found.setdefault(name, []).append(message)
    lines = []
    for name, messages in found.items():
        flag = name_of(name)
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


def _entry_message(location: tuple[int | str, ...], message: str, field: FieldInfo) -> str:
    """The message about one entry of a table: it names the key, and suggests one for an unknown key."""
    key = str(location[1])
    kind = get_args(field.annotation)[0]
    if location[-1] != "[key]" or not issubclass(kind, Enum):
        return f"{key} {message}"
    hint = suggestion(key, [str(choice.value) for choice in kind])
    return f"unknown key {key}{hint or f'; it {message}'}"


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
        elif kind in (int, float) or (kind is str and name not in _URI_SETTINGS):
            words.append(_METAVARS[kind])
        elif kind is str:
            words.append("URI")
    return "|".join(dict.fromkeys(words))


_URI_SETTINGS = frozenset({"manifest", "output", "weights", "labels", "folder", "bundle", "images"})


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
