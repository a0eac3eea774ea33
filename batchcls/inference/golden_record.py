"""The float32 network of a bundle, from which golden outputs are computed and which is tested with them."""

from dataclasses import replace

import torch

from batchcls.inference.engine_startup import self_test
from batchcls.inference.golden_test import GOLDEN_IMAGES_VERSION, golden_pixels, predict_golden_images
from batchcls.inference.postprocess import average
from batchcls.models.backbone import Backbone
from batchcls.models.build import build_backbone
from batchcls.models.engines.engine import REFERENCE, EngineConfig
from batchcls.models.engines.torch_eager import TorchEager
from batchcls.models.export import Program
from batchcls.models.golden import Deviation, check_golden, create_golden
from batchcls.models.model_bundle import Bundle, BundleConfig


def with_golden(bundle: Bundle) -> Bundle:
    """Return the bundle with the golden outputs of its network, computed in float32 on the CPU of this machine.

    The names of the tensors of its classifier, which the network of the library determines, are recorded as well.

    Raises:
        InputError: the bundle is inconsistent.
    """
    preprocessing = bundle.config.preprocessing
    threads = torch.get_num_threads()
    backbone = build_backbone(bundle)
    engine = TorchEager(backbone, preprocessing, "cpu", REFERENCE.precision, threads)
    found = predict_golden_images(preprocessing, engine)
    golden = create_golden(found.probabilities, found.embedding, bundle.config.labels, GOLDEN_IMAGES_VERSION)
    changes = {"golden": golden, "head_tensors": backbone.head_tensors}
    return replace(bundle, config=bundle.config.model_copy(update=changes))


def verified_bundle(bundle: Bundle) -> Bundle:
    """Return the bundle as it is read back from the bytes of its files, after its network has passed the golden test.

    Call this before a new bundle is saved; `classify` performs the same checks before its first image.

    Raises:
        InputError: the files cannot be read back.
        GoldenMismatch: the network does not reproduce the golden outputs of the bundle.
    """
    found = bundle.round_trip()
    engine = TorchEager(
        build_backbone(found), found.config.preprocessing, "cpu", REFERENCE.precision, torch.get_num_threads()
    )
    self_test(found.config, engine)
    return found


def tested_backbone(bundle: Bundle, config: EngineConfig) -> Backbone:
    """Return the network of the bundle, after it has passed the golden test in float32 on the configured device.

    Raises:
        InputError: the bundle is inconsistent.
        GoldenMismatch: the network does not reproduce the golden outputs of the bundle.
    """
    backbone = build_backbone(bundle)
    preprocessing = bundle.config.preprocessing
    self_test(
        bundle.config, TorchEager(backbone, preprocessing, config.device, REFERENCE.precision, config.threads)
    )
    return backbone


def check_program(config: BundleConfig, program: Program) -> Deviation:
    """Compare the outputs of an exported program with the golden outputs of its bundle, as `self_test` does.

    Raises:
        GoldenMismatch: the program does not reproduce the golden outputs.
    """
    golden = config.require_golden(GOLDEN_IMAGES_VERSION)
    found = average(program(golden_pixels(config.preprocessing)), views=1, l2_normalize=False)
    return check_golden(golden, found.probabilities, found.embedding, config.labels, REFERENCE.precision)
