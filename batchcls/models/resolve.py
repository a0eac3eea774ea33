"""`--model BUNDLE|NAME|timm:NAME|torchvision:NAME`, with what goes with it, becomes a bundle."""

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
_WORDS: Mapping[str, ArgumentValue] = {"true": True, "false": False, "none": None}


def resolve_model(model: str, choices: ModelChoices, storage: Storage) -> Bundle:
    """The bundle behind `--model`.

    A folder is read. A library's name is built, with the weights of a file (`choices.weights`), or
    random ones if allowed, or else the library's published ones, downloaded.

    Raises:
        InputError: anything named is missing, unknown or does not fit; the message has the remedy.
    """
    if not _is_name(model, storage):
        _refuse_choices(choices)
        return Bundle.load(normalize_uri(model), storage)
    # The libraries take seconds to import, and a job whose model is a folder needs none of them.
    from batchcls.models.create import create_bundle  # noqa: PLC0415

    return create_bundle(model, choices, storage)


def check_model(model: str, choices: ModelChoices, storage: Storage) -> BundleConfig | None:
    """Refuse in a moment what `resolve_model` would refuse after seconds; imports no library.

    Returns:
        The record of a bundle; None for an architecture.

    Raises:
        InputError: there is no such architecture, bundle or file.
    """
    if not _is_name(model, storage):
        _refuse_choices(choices)
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


def _is_name(model: str, storage: Storage) -> bool:
    """Whether `model` is an architecture's name. Raises InputError if it may be a bundle as well."""
    if not looks_like_model_name(model):
        return False
    if not is_model_name(model):
        if not storage.exists(model):
            raise InputError(
                f"--model {model}: there is neither such a folder nor such a model{suggest_names(model)}"
            )
        return False
    if qualified_name(model) is not None and storage.exists(join(model, CONFIG_FILE)):
        raise InputError(
            f"--model {model}: there is a bundle in the folder {model} and an architecture of that name; write "
            f"./{model} for the bundle or {qualified_name(model)} for the architecture"
        )
    return True


def parse_model_arguments(text: str) -> dict[str, ArgumentValue]:
    """`key=value,key=value` with typed values: true, false, none, 3, 0.5, same.

    A value in quotes stays text.

    Raises:
        InputError: a part has no `=`, no proper name, or a name is repeated.
    """
    arguments: dict[str, ArgumentValue] = {}
    for part in filter(None, (piece.strip() for piece in text.split(","))):
        name, equals, value = (piece.strip() for piece in part.partition("="))
        if not equals or not _ARGUMENT_NAME.fullmatch(name):
            raise InputError(f"--model-args: {part!r} is not key=value, as in pad_type=same,drop_rate=0.1")
        if name in arguments:
            raise InputError(f"--model-args: {name} is given twice; give it once")
        arguments[name] = _typed(value)
    return arguments


def _typed(text: str) -> ArgumentValue:
    if len(text) > 1 and text[0] == text[-1] and text[0] in "'\"":
        return text[1:-1]
    if text.lower() in _WORDS:
        return _WORDS[text.lower()]
    readers: tuple[Callable[[str], ArgumentValue], ...] = (int, float)
    for reader in readers:
        try:
            return reader(text)
        except ValueError:
            continue
    return text


def _refuse_choices(choices: ModelChoices) -> None:
    given = {
        "--weights": choices.weights,
        "--labels": choices.labels,
        "--model-args": choices.arguments,
        "--allow-random-weights": choices.allow_random,
        "--embedding-tap": choices.tap != "pooled",
        "--mean, --std, --input-size, --crop-pct or --interpolation": choices.overrides.model_fields_set,
    }
    refused = [name for name, value in given.items() if value]
    if refused:
        raise InputError(
            f"{', '.join(refused)}: --model is a bundle, which brings its own; leave that out, or name "
            "an architecture as --model"
        )
