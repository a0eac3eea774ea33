"""What the benchmark computes and draws: ratios, projections, agreement, its choice of photographs, the image."""

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
    projected,
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
from benchmarks.peers.bare_loop import ahead, load, load_with_pillow, top_five
from benchmarks.plot import Panel, draw


def test_the_ratio_is_the_median_of_those_within_a_round_not_of_the_rates():
    # The machine was ten times slower in the second round, for both.
    ours = [Timing(100, 1), Timing(100, 10), Timing(100, 1)]
    theirs = [Timing(100, 4), Timing(100, 50), Timing(100, 6)]
    assert median_of_ratios(ours, theirs) == pytest.approx(5)


def test_programs_with_unequal_rounds_are_not_compared():
    with pytest.raises(ValueError, match="zip"):
        median_of_ratios([Timing(1, 1)], [Timing(1, 1), Timing(1, 1)])


def test_a_projection_counts_start_up_once():
    # 10 s of start-up and 0.1 s an image.
    found = projected(Timing(64, 16.4), Timing(400, 50), 2000)
    assert found.seconds == pytest.approx(210)
    assert (found.images, found.measured_images) == (2000, 400)


@pytest.mark.parametrize("small_seconds", [60.0, 50.0, 1.0])
def test_a_projection_from_runs_that_contradict_each_other_keeps_the_larger_runs_rate(small_seconds):
    # The small run was slower than the large one, as slow, or faster than start-up of nothing allows.
    found = projected(Timing(64, small_seconds), Timing(400, 50), 2000)
    assert found.images_per_second == pytest.approx(8)


def test_agreement_is_over_the_photographs_of_the_other():
    ours = {"a": "cat", "b": "dog", "c": "owl", "d": "fox"}
    assert agreement(ours, {"a": "cat", "b": "cow"}) == 0.5
    for wrong in ({}, {"z": "cat"}):
        with pytest.raises(DisagreementError):
            agreement(ours, wrong)


@pytest.mark.parametrize("share", [0.9699, float("nan")])
def test_a_program_that_answers_otherwise_is_refused(share):
    with pytest.raises(DisagreementError, match="Daft"):
        require_agreement("Daft", share)
    require_agreement("Daft", 0.97)


def test_efficiency_needs_a_rate_after_start_of_both():
    ours = [Timing(10, 1, 40.0), Timing(10, 1, 45.0), Timing(10, 1, 50.0)]
    assert efficiency(ours, [Timing(10, 1, 50.0)] * 3) == pytest.approx(0.9)
    assert efficiency(ours, [Timing(10, 1)] * 3) is None


def test_the_summary_has_medians_and_can_be_written_as_json():
    rounds = {"job": [Timing(100, 2, 60.0), Timing(100, 4, 70.0)], "ray": [Timing(100, 20), Timing(100, 20)]}
    found = json.loads(json.dumps(summarize(rounds, "job")))
    assert found["job"]["images_per_second"] == 37.5
    assert found["job"]["images_per_second_after_start"] == 65
    assert "job_is_times_as_fast" not in found["job"]
    assert found["ray"]["job_is_times_as_fast"] == 7.5
    assert len(found["ray"]["rounds"]) == 2


def test_the_engine_of_a_job_is_read_from_its_record():
    measured = {"engines": {"openvino bf16 on cpu": 1}, "engine_selections": [{"batch_size": 32}]}
    assert JobEngine.of(measured) == JobEngine("openvino", "bf16", 32)
    assert JobEngine.of({"engines": {"torch fp32 on cpu": 2}}) == JobEngine("torch", "fp32", 16)
    with pytest.raises(ValueError, match="names no engine"):
        JobEngine.of({"engines": {}})


def test_every_program_is_started_with_what_it_needs(tmp_path):
    files = Files(
        "m", *(tmp_path / name for name in ("weights", "labels", "bundle", "images.txt", "manifest"))
    )
    assert set(CONTENDERS_AT_500_PIXELS) | set(CONTENDERS_AT_1500_PIXELS) == set(CONTENDERS)
    for contender in CONTENDERS.values():
        engine = JobEngine("openvino", "int8", 16)
        found = command(contender, files, tmp_path / "out", int8_min_agreement=0.9, engine=engine)
        assert found[:2] == ["-m", contender.module]
        assert ("--int8-min-agreement" in found) == (contender.name == "job-int8")
        assert ("--tuned" in found) == (contender.kind == "tuned")
        assert ("int8" in found) == (contender.kind == "ceiling")
        assert str(files.manifest if contender.kind == "job" else files.images) in found


def test_a_ceiling_has_the_engine_of_a_job_that_is_there():
    for names in (CONTENDERS_AT_500_PIXELS, CONTENDERS_AT_1500_PIXELS):
        for contender in (CONTENDERS[name] for name in names):
            if contender.kind == "ceiling":
                assert CONTENDERS[contender.engine_of].kind == "job"
                assert contender.engine_of in names


def test_the_best_labels_are_read_from_peers_and_from_the_job(tmp_path):
    peer, job = tmp_path / "peer", tmp_path / "job" / "runs" / "one" / "predictions"
    for folder, columns in (
        (peer, {"path": ["/a", "/b"], "labels": [["cat", "dog"], ["owl", "cat"]]}),
        (job, {"uri": ["/b", "/a"], "label": ["owl", "cat"]}),
    ):
        folder.mkdir(parents=True)
        pq.write_table(pa.table(columns), folder / "part.parquet")
    wanted = {"/a": "cat", "/b": "owl"}
    assert best_labels(CONTENDERS["ray"], peer) == wanted
    assert best_labels(CONTENDERS["job"], tmp_path / "job") == wanted


def _draw_photographs(folder, count):
    folder.mkdir(parents=True)
    for number in range(count):
        Image.new("RGB", (50, 40), (number, 0, 0)).save(folder / f"{number}.jpg")


def test_photographs_are_all_different_while_there_are_enough_and_the_same_every_time(tmp_path):
    _draw_photographs(tmp_path / "imagenet", 3)
    _draw_photographs(tmp_path / "catalog" / "train", 6)
    found = choose_images(tmp_path, 7)
    assert len(set(found)) == 7
    assert found == choose_images(tmp_path, 7)
    assert sum("imagenet" in path.parts for path in found) == 3
    assert len(set(choose_images(tmp_path, 12))) == 9
    with pytest.raises(FileNotFoundError, match="no photographs"):
        choose_images(tmp_path / "nothing", 1)


def test_photographs_are_enlarged_to_a_long_side(tmp_path):
    _draw_photographs(tmp_path / "imagenet", 2)
    paths = sorted((tmp_path / "imagenet").iterdir())
    found = enlarge_images(paths, tmp_path / "large", 150)
    assert [Image.open(path).size for path in found] == [(150, 120)] * 2


def test_the_five_best_are_those_of_torch():
    logits = np.random.default_rng(0).normal(size=(7, 40)).astype(np.float32)
    classes, values = top_five(logits)
    wanted = torch.from_numpy(logits).softmax(dim=1).topk(5)
    assert np.array_equal(classes, wanted.indices.numpy())
    assert values == pytest.approx(wanted.values.numpy(), rel=1e-5)


def test_what_goes_wrong_while_loading_ahead_is_raised_where_it_is_read():
    def broken():
        yield np.zeros(3, np.uint8)
        raise ValueError("the disk is gone")

    batches = ahead(broken())
    assert next(batches).size == 3
    with pytest.raises(ValueError, match="the disk is gone"):
        next(batches)


def test_the_image_is_light_and_wide_enough_for_a_readme(tmp_path):
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
    ink = np.array([0x0F, 0x6F, 0xC5])  # this job's bars
    assert (pixels == ink).all(axis=2).sum() > 10_000
    assert (pixels == 255).all(axis=2).mean() > 0.4


def test_both_loaders_of_the_bare_loop_show_the_network_the_same(tmp_path):
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
