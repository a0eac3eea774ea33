"""Tests for the benchmarks: ratios, projections, agreement, the selection of photographs, and the plot."""

import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from batchcls.preprocessing import Preprocessing
from benchmarks.arithmetic import (
    DisagreementError,
    Timing,
    agreement,
    efficiency,
    median_of_ratios,
    project,
    require_agreement,
    summarize,
)
from benchmarks.contenders import (
    CONTENDERS,
    CONTENDERS_AT_500_PIXELS,
    CONTENDERS_AT_1500_PIXELS,
    Files,
    JobEngine,
    best_labels,
    command,
)
from benchmarks.images import choose_images, enlarge_images
from benchmarks.peers.bare_loop import load, load_with_pillow, prefetch, top_five
from benchmarks.plot import Panel, draw


def test_speedup_is_the_median_of_the_ratios_within_a_round():
    # The machine was ten times slower in the second round.
    ours = [Timing(100, 1), Timing(100, 10), Timing(100, 1)]
    theirs = [Timing(100, 4), Timing(100, 50), Timing(100, 6)]
    assert median_of_ratios(ours, theirs) == pytest.approx(5)


def test_different_numbers_of_rounds_are_rejected():
    with pytest.raises(ValueError, match="zip"):
        median_of_ratios([Timing(1, 1)], [Timing(1, 1), Timing(1, 1)])


def test_projection_counts_startup_once():
    # 10 s of startup and 0.1 s per image.
    timing = project(Timing(64, 16.4), Timing(400, 50), 2000)
    assert timing.seconds == pytest.approx(210)
    assert (timing.images, timing.measured_images) == (2000, 400)


@pytest.mark.parametrize("small_seconds", [60.0, 50.0, 1.0])
def test_projection_from_contradicting_runs_uses_the_rate_of_the_larger_run(small_seconds):
    # The small run takes longer than the large one, as long, or less than without any startup.
    timing = project(Timing(64, small_seconds), Timing(400, 50), 2000)
    assert timing.images_per_second == pytest.approx(8)


def test_agreement_covers_the_photographs_of_the_other_program():
    ours = {"a": "cat", "b": "dog", "c": "owl", "d": "fox"}
    assert agreement(ours, {"a": "cat", "b": "cow"}) == 0.5
    for theirs in ({}, {"z": "cat"}):
        with pytest.raises(DisagreementError):
            agreement(ours, theirs)


@pytest.mark.parametrize("share", [0.9699, float("nan")])
def test_too_low_agreement_is_rejected(share):
    with pytest.raises(DisagreementError, match="Daft"):
        require_agreement("Daft", share)
    require_agreement("Daft", 0.97)


def test_efficiency_needs_the_rate_after_startup_of_both_programs():
    ours = [Timing(10, 1, 40.0), Timing(10, 1, 45.0), Timing(10, 1, 50.0)]
    assert efficiency(ours, [Timing(10, 1, 50.0)] * 3) == pytest.approx(0.9)
    assert efficiency(ours, [Timing(10, 1)] * 3) is None


def test_summary_contains_medians_and_is_json_serializable():
    rounds = {"job": [Timing(100, 2, 60.0), Timing(100, 4, 70.0)], "ray": [Timing(100, 20), Timing(100, 20)]}
    summary = json.loads(json.dumps(summarize(rounds, "job")))
    assert summary["job"]["images_per_second"] == 37.5
    assert summary["job"]["images_per_second_after_start"] == 65
    assert "job_is_times_as_fast" not in summary["job"]
    assert summary["ray"]["job_is_times_as_fast"] == 7.5
    assert len(summary["ray"]["rounds"]) == 2


def test_engine_of_a_job_is_read_from_its_record():
    measurements = {"engines": {"openvino bf16 on cpu": 1}, "engine_selections": [{"batch_size": 32}]}
    assert JobEngine.of(measurements) == JobEngine("openvino", "bf16", 32)
    assert JobEngine.of({"engines": {"torch fp32 on cpu": 2}}) == JobEngine("torch", "fp32", 16)
    with pytest.raises(ValueError, match="names no engine"):
        JobEngine.of({"engines": {}})


def test_every_program_gets_the_arguments_of_its_kind(tmp_path):
    files = Files(
        "m", *(tmp_path / name for name in ("weights", "labels", "bundle", "images.txt", "manifest"))
    )
    assert set(CONTENDERS_AT_500_PIXELS) | set(CONTENDERS_AT_1500_PIXELS) == set(CONTENDERS)
    for contender in CONTENDERS.values():
        engine = JobEngine("openvino", "int8", 16)
        arguments = command(contender, files, tmp_path / "out", int8_min_agreement=0.9, engine=engine)
        assert arguments[:2] == ["-m", contender.module]
        assert ("--int8-min-agreement" in arguments) == (contender.name == "job-int8")
        assert ("--tuned" in arguments) == (contender.kind == "tuned")
        assert ("int8" in arguments) == (contender.kind == "ceiling")
        assert str(files.manifest if contender.kind == "job" else files.images) in arguments


def test_every_ceiling_uses_the_engine_of_a_job_of_the_same_suite():
    for names in (CONTENDERS_AT_500_PIXELS, CONTENDERS_AT_1500_PIXELS):
        for contender in (CONTENDERS[name] for name in names):
            if contender.kind == "ceiling":
                assert CONTENDERS[contender.engine_of].kind == "job"
                assert contender.engine_of in names


def test_top1_labels_are_read_from_programs_and_from_the_job(tmp_path):
    peer, job = tmp_path / "peer", tmp_path / "job" / "runs" / "one" / "predictions"
    for folder, columns in (
        (peer, {"path": ["/a", "/b"], "labels": [["cat", "dog"], ["owl", "cat"]]}),
        (job, {"uri": ["/b", "/a"], "label": ["owl", "cat"]}),
    ):
        folder.mkdir(parents=True)
        pq.write_table(pa.table(columns), folder / "part.parquet")
    expected = {"/a": "cat", "/b": "owl"}
    assert best_labels(CONTENDERS["ray"], peer) == expected
    assert best_labels(CONTENDERS["job"], tmp_path / "job") == expected


def _draw_photographs(folder, count):
    folder.mkdir(parents=True)
    for number in range(count):
        Image.new("RGB", (50, 40), (number, 0, 0)).save(folder / f"{number}.jpg")


def test_selected_photographs_are_distinct_if_possible_and_reproducible(tmp_path):
    _draw_photographs(tmp_path / "imagenet", 3)
    _draw_photographs(tmp_path / "catalog" / "train", 6)
    images = choose_images(tmp_path, 7)
    assert len(set(images)) == 7
    assert images == choose_images(tmp_path, 7)
    assert sum("imagenet" in path.parts for path in images) == 3
    assert len(set(choose_images(tmp_path, 12))) == 9
    with pytest.raises(FileNotFoundError, match="no photographs"):
        choose_images(tmp_path / "nothing", 1)


def test_photographs_are_enlarged_to_the_given_long_side(tmp_path):
    _draw_photographs(tmp_path / "imagenet", 2)
    paths = sorted((tmp_path / "imagenet").iterdir())
    enlarged = enlarge_images(paths, tmp_path / "large", 150)
    assert [Image.open(path).size for path in enlarged] == [(150, 120)] * 2


def test_top_five_equals_topk_of_torch():
    logits = np.random.default_rng(0).normal(size=(7, 40)).astype(np.float32)
    classes, values = top_five(logits)
    expected = torch.from_numpy(logits).softmax(dim=1).topk(5)
    assert np.array_equal(classes, expected.indices.numpy())
    assert values == pytest.approx(expected.values.numpy(), rel=1e-5)


def test_errors_during_prefetching_are_raised_in_the_consumer():
    def broken():
        yield np.zeros(3, np.uint8)
        raise ValueError("the disk failed")

    batches = prefetch(broken())
    assert next(batches).size == 3
    with pytest.raises(ValueError, match="the disk failed"):
        next(batches)


def test_plot_has_a_light_background_and_the_width_of_a_readme(tmp_path):
    programs = {
        name: {"images_per_second": 10.0 * number + 5, "job_is_times_as_fast": 2.0}
        for number, name in enumerate(CONTENDERS)
    }
    path = tmp_path / "image.png"
    draw([Panel("resnet50, photographs", programs), Panel("another", programs)], "2 cores, today", path)
    with Image.open(path) as image:
        pixels = np.asarray(image.convert("RGB"))
    assert pixels.shape[1] == 1600
    assert (pixels[[0, -1]] == 255).all()
    ink = np.array([0x0F, 0x6F, 0xC5])  # the bars of the job
    assert (pixels == ink).all(axis=2).sum() > 10_000
    assert (pixels == 255).all(axis=2).mean() > 0.4


def test_both_loaders_of_the_bare_loop_give_similar_pixels(tmp_path):
    random = np.random.default_rng(0)
    paths = []
    for number, size in enumerate([(300, 375), (375, 300), (500, 499)]):
        image = Image.fromarray(random.integers(0, 255, (12, 12, 3), np.uint8)).resize(size)
        paths.append(str(tmp_path / f"{number}.jpg"))
        image.save(paths[-1], quality=95)
    preprocessing = Preprocessing(
        input_height=224,
        input_width=224,
        resize_height=256,
        resize_width=256,
        mean=(0.5,) * 3,
        std=(0.5,) * 3,
    )
    ours = np.concatenate(list(load(paths, preprocessing, 2, 2)))
    pillows = np.concatenate(list(load_with_pillow(paths, preprocessing, 2, 2)))
    assert ours.shape == pillows.shape == (3, 224, 224, 3)
    assert np.abs(ours.astype(int) - pillows).mean() < 1
