"""Resolves `--model BUNDLE|NAME|timm:NAME|torchvision:NAME` and its related settings to a bundle."""

import re
from collections.abc import Callable, Mapping
from typing import cast

from batchcls.errors import InputError
from batchcls.models.model_bundle import CONFIG_FILE, Bundle, BundleConfig
from batchcls.models.model_names import is_known_architecture, is_model_name, qualified_name, suggest_names
from batchcls.models.model_spec import ArgumentValue, ModelChoices, SourceName
from batchcls.storage.filesystem import Storage, explain, join, redact_uri
from batchcls.storage.uris import looks_like_model_name, normalize_uri

_ARGUMENT_NAME = re.compile(r"[A-Za-z_]\w*")
_KEYWORDS: Mapping[str, ArgumentValue] = {"true": True, "false": False, "none": None}


def resolve_model(model: str, choices: ModelChoices, storage: Storage) -> Bundle:
    """Return the bundle that `--model` names: read from its folder, or created from an architecture.

    See `create.create_bundle` for the weights of an architecture.

    Raises:
        InputError: a name or file does not exist, or does not fit the others; the message names the remedy.
    """
    if not _is_architecture(model, storage):
        _reject_choices(choices)
        return Bundle.load(normalize_uri(model), storage)
    # The libraries take seconds to import, and a job whose model is a bundle does not need them yet.
    from batchcls.models.create import create_bundle  # noqa: PLC0415

    return create_bundle(model, choices, storage)


def check_model(model: str, choices: ModelChoices, storage: Storage) -> BundleConfig | None:
    """Check quickly, without importing a library, that the files and names which `resolve_model` needs exist.

    Returns:
        The record of a bundle; None for an architecture.

    Raises:
        InputError: there is no such architecture, bundle or file.
    """
    if not _is_architecture(model, storage):
        _reject_choices(choices)
        return Bundle.read_config(normalize_uri(model), storage)
    source, _, architecture = (qualified_name(model) or model).partition(":")
    if not is_known_architecture(cast("SourceName", source), architecture):
        raise InputError(f"--model {model}: there is no such model{suggest_names(model)}")
    for flag, uri in (("--weights", choices.weights), ("--labels", choices.labels)):
        if uri is not None:
            with explain(uri):
                if not storage.exists(uri):
                    raise InputError(f"{flag} {redact_uri(uri)}: there is no such file")
    return None


def _is_architecture(model: str, storage: Storage) -> bool:
    """Return whether `model` is the name of an architecture. Raises InputError if it is also a bundle."""
    if not looks_like_model_name(model):
        return False
    if not is_model_name(model):
        if not storage.exists(model):
            raise InputError(
                f"--model {model}: there is no folder and no model of this name{suggest_names(model)}"
            )
        return False
    if qualified_name(model) is not None and storage.exists(join(model, CONFIG_FILE)):
        raise InputError(
            f"--model {model}: there is a bundle in the folder {model} and an architecture of this name; write "
            f"./{model} for the bundle or {qualified_name(model)} for the architecture"
        )
    return True


def parse_model_arguments(text: str) -> dict[str, ArgumentValue]:
    """Parse `key=value,key=value` with typed values: true, false, none, 3, 0.5, same.

    A value in quotes is always a string.

    Raises:
        InputError: a part has no `=` or no valid name, or a name is repeated.
    """
    arguments: dict[str, ArgumentValue] = {}
    for part in filter(None, (piece.strip() for piece in text.split(","))):
        name, equals, value = (piece.strip() for piece in part.partition("="))
        if not equals or not _ARGUMENT_NAME.fullmatch(name):
            raise InputError(f"--model-args: {part!r} is not key=value, as in pad_type=same,drop_rate=0.1")
        if name in arguments:
            raise InputError(f"--model-args: {name} is given twice; give it once")
        arguments[name] = _parse_value(value)
    return arguments


def _parse_value(text: str) -> ArgumentValue:
    if len(text) > 1 and text[0] == text[-1] and text[0] in "'\"":
        return text[1:-1]
    if text.lower() in _KEYWORDS:
        return _KEYWORDS[text.lower()]
    parsers: tuple[Callable[[str], ArgumentValue], ...] = (int, float)
    for parse in parsers:
        try:
            return parse(text)
        except ValueError:
            continue
    return text


def _reject_choices(choices: ModelChoices) -> None:
    settings = {
        "--weights": choices.weights,
        "--labels": choices.labels,
        "--model-args": choices.arguments,
        "--allow-random-weights": choices.allow_random,
        "--embedding-tap": choices.tap != "pooled",
        "--mean, --std, --input-size, --crop-pct or --interpolation": choices.overrides.model_fields_set,
    }
    given = [name for name, value in settings.items() if value]
    if given:
        raise InputError(
            f"{', '.join(given)}: not possible with a bundle as --model, which already contains these settings; omit "
            "them, or name an architecture as --model"
        )
