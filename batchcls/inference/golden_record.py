"""The network as its library builds it, in float32: where golden answers come from, and what is tested by them."""

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
    """The bundle with the golden answers of its own network, in float32 on this machine's CPU.

    Raises:
        InputError: the bundle does not hold together.
    """
    preprocessing = bundle.config.preprocessing
    threads = torch.get_num_threads()
    engine = TorchEager(build_backbone(bundle), preprocessing, "cpu", REFERENCE.precision, threads)
    found = predict_golden_images(preprocessing, engine)
    golden = create_golden(found.probabilities, found.embedding, bundle.config.labels, GOLDEN_IMAGES_VERSION)
    return replace(bundle, config=bundle.config.model_copy(update={"golden": golden}))


def verified_bundle(bundle: Bundle) -> Bundle:
    """The bundle read back from the bytes of its files, after its network has given the golden answers.

    What `classify` does before its first image; for whoever is about to put a bundle in place.

    Raises:
        InputError: the files would be refused.
        GoldenMismatch: the network does not answer as the bundle says.
    """
    found = bundle.round_trip()
    engine = TorchEager(
        build_backbone(found), found.config.preprocessing, "cpu", REFERENCE.precision, torch.get_num_threads()
    )
    self_test(found.config, engine)
    return found


def tested_backbone(bundle: Bundle, place: EngineConfig) -> Backbone:
    """The bundle's network, after it has given the golden answers in float32 on the place's device.

    Raises:
        InputError: the bundle does not hold together.
        GoldenMismatch: the network does not answer as the bundle says.
    """
    backbone = build_backbone(bundle)
    preprocessing = bundle.config.preprocessing
    self_test(
        bundle.config, TorchEager(backbone, preprocessing, place.device, REFERENCE.precision, place.threads)
    )
    return backbone


def check_program(config: BundleConfig, program: Program) -> Deviation:
    """Hold an exported program against the golden answers of its bundle, as `self_test` does an engine.

    Raises:
        GoldenMismatch: the program answers otherwise.
    """
    golden = config.require_golden(GOLDEN_IMAGES_VERSION)
    found = average(program(golden_pixels(config.preprocessing)), views=1, l2_normalize=False)
    return check_golden(golden, found.probabilities, found.embedding, config.labels, REFERENCE.precision)
