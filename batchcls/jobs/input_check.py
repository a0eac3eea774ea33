"""Checks the inputs of `finetune`, `evaluate` and `compare` before PyTorch is imported and a cluster is started.

Both take seconds, so a misspelled name is reported before. `classify_plan.check_inputs` does the same for `classify`.
"""

from batchcls.comparison.candidates import check_engines
from batchcls.config.compare_config import CompareConfig
from batchcls.config.evaluate_config import EvaluateConfig
from batchcls.config.finetune_config import LINEAR_PROBE, FinetuneConfig
from batchcls.errors import InputError
from batchcls.manifest.labeled_manifest import open_labeled_manifest, read_label_column
from batchcls.manifest.snapshot import Manifest
from batchcls.models.cascade_record import label_difference
from batchcls.models.labels import read_labels
from batchcls.models.model_bundle import Bundle
from batchcls.models.model_spec import ModelChoices
from batchcls.models.resolve import check_model, parse_model_arguments
from batchcls.storage.filesystem import Storage, explain
from batchcls.training.categories import resolve_category_order
from batchcls.training.held_out import require_tuning_rows
from batchcls.training.recipe import read_recipe
from batchcls.training.teacher_bundles import check_teachers


def check_finetune(config: FinetuneConfig) -> tuple[Manifest, Manifest]:
    """Check recipe, model, labels and manifests, the classes of --teacher, and the number of rows for --tune.

    Returns:
        The opened manifests of the training and the validation images.

    Raises:
        InputError: an input is missing, cannot be read, or does not match the others; the message names the remedy.
    """
    storage = Storage(config.storage_options)
    if config.recipe != LINEAR_PROBE:
        read_recipe(config.recipe)
    arguments = parse_model_arguments(config.model_args or "")
    known = check_model(config.model, ModelChoices(weights=config.weights, arguments=arguments), storage)
    labels = read_labels(config.labels, storage) if config.labels is not None else None
    training, validation = (
        open_labeled_manifest(uri, storage, config.label_column, id_column=config.id_column)
        for uri in (config.manifest, config.validation)
    )
    if config.teacher or config.tune is not None:
        column = read_label_column(training, storage)
        categories = resolve_category_order(column, labels, known.labels if known is not None else ())
        check_teachers(config.teacher, categories, storage)
        if config.tune is not None:
            require_tuning_rows(column.codes[column.codes >= 0], config.tuning_fraction, config.seed)
    return training, validation


def check_evaluate(config: EvaluateConfig) -> Manifest:
    """Check the settings, the outputs and the bundles, and return the opened manifest.

    Raises:
        InputError: settings exclude each other, or an input or output is missing or cannot be read.
    """
    if config.cascade and config.model is None:
        raise InputError("--cascade compares two bundles; specify them with --model SMALL,LARGE")
    if (config.model is None) == (config.run is None):
        raise InputError("specify what to evaluate, either --model BUNDLE or --run OUTPUT/runs/ID")
    if config.model is None and config.write_bundle is not None:
        raise InputError(
            "--write-bundle: a run stores no logits, so there is no temperature; use --model BUNDLE"
        )
    if config.model is None and config.tta != "none":
        raise InputError(
            "--tta: the views of a run are already averaged; remove the flag, or use --model BUNDLE"
        )
    storage = Storage(config.storage_options)
    for uri in (config.output, config.write_bundle):
        if uri is not None:
            with explain(uri):
                storage.list_files(uri)
    records = [Bundle.read_config(uri, storage) for uri in config.models]
    if config.cascade:
        difference = label_difference(*(record.labels for record in records))
        if difference is not None:
            raise InputError(f"--cascade: the models do not have the same labels: {difference}")
    return open_labeled_manifest(
        config.manifest, storage, config.label_column, id_column=config.id_column, limit=config.limit
    )


def check_compare(config: CompareConfig) -> Manifest:
    """Check the names of engines and models, and return the opened manifest.

    Raises:
        InputError: there is no such engine, architecture, bundle, manifest or column.
    """
    check_engines(config.engines)
    storage = Storage(config.storage_options)
    for model in config.models:
        check_model(model, ModelChoices(), storage)
    return open_labeled_manifest(
        config.manifest,
        storage,
        config.label_column,
        id_column=config.id_column,
        optional="label_column" not in config.model_fields_set,  # a column that is named must exist
    )
