"""Checks the inputs of a training command within seconds, before PyTorch is imported and a cluster is started."""

from batchcls.config.finetune_config import LINEAR_PROBE, FinetuneConfig
from batchcls.manifest.labeled_manifest import open_labeled_manifest
from batchcls.models.labels import read_labels
from batchcls.models.model_spec import ModelChoices
from batchcls.models.resolve import check_model, parse_model_arguments
from batchcls.storage.filesystem import Storage
from batchcls.training.recipe import read_recipe


def check_inputs(config: FinetuneConfig) -> None:
    """Check that recipe, model, labels and manifests exist, and that the manifests have the columns that are read.

    Raises:
        InputError: an input is missing, cannot be read, or has an unsupported type; the message names the remedy.
    """
    storage = Storage(config.storage_options)
    if config.recipe != LINEAR_PROBE:
        read_recipe(config.recipe)
    arguments = parse_model_arguments(config.model_args or "")
    check_model(config.model, ModelChoices(weights=config.weights, arguments=arguments), storage)
    if config.labels is not None:
        read_labels(config.labels, storage)
    for uri in (config.manifest, config.validation):
        open_labeled_manifest(uri, storage, config.label_column, id_column=config.id_column)
