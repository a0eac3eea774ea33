import json
import math
import re
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from batchcls.cli.tables import bottleneck_table
from batchcls.config.classify_config import ClassifyConfig
from batchcls.runs.bottleneck import Bottleneck, find_bottleneck
from batchcls.runs.utilization import STAGES, Busy, Capacity, StageUsage, other_seconds

seconds = st.floats(0.0, 1e6, allow_nan=False)
busies = st.builds(Busy, **dict.fromkeys(STAGES, seconds))
capacities = st.builds(
    Capacity,
    cpus=st.floats(0.25, 4096),
    loaders=st.integers(1, 1024),
    fetch_threads=st.integers(1, 256),
    gpus=st.sampled_from([0.0, 0.5, 1.0, 8.0, 64.0]),
    decode_threads=st.integers(0, 4096),
    predict_threads=st.integers(0, 4096),
)
runs = st.builds(
    StageUsage,
    rows=st.integers(1, 10**9),
    wall_seconds=st.floats(1.0, 1e6),
    start_seconds=st.floats(0.0, 1.0),
    shape=st.sampled_from(["fused", "staged"]),
    busy=busies,
    capacity=capacities,
    fragment_rows=st.integers(1, 10**6),
    engine_was_measured=st.booleans(),
)


def fused(**changes: object) -> StageUsage:
    """2,000 images on two busy CPUs: 2 ms decoding, 17 ms inference, 0.5 ms for each other stage."""
    run = StageUsage(
        rows=2000,
        wall_seconds=24.0,
        start_seconds=4.0,
        shape="fused",
        busy=Busy(fetch=1.0, decode=4.0, predict=34.0, write=1.0, other=1.0),
        capacity=Capacity(cpus=2, loaders=2, fetch_threads=4),
        fragment_rows=128,
        engine="torch fp32",
    )
    return replace(run, **changes)


def on_gpus(**changes: object) -> StageUsage:
    """100,000 images: 16 CPUs decode at 4 ms/image; the GPU needs 0.5 ms/image and is idle half of the time."""
    run = StageUsage(
        rows=100_000,
        wall_seconds=110.0,
        start_seconds=10.0,
        shape="staged",
        busy=Busy(fetch=3000.0, decode=1400.0, predict=50.0, write=40.0, other=160.0),
        capacity=Capacity(cpus=16, loaders=16, fetch_threads=32, gpus=1),
        engine="torch bf16",
    )
    return replace(run, **changes)


@given(runs)
def test_ideal_throughput_is_the_lowest_of_all_resources(run: StageUsage):
    bottleneck = find_bottleneck(run)
    assert bottleneck.ideal_images_per_second == min(
        resource.images_per_second for resource in bottleneck.resources
    )
    for resource in bottleneck.resources:
        held = sum(getattr(run.busy, stage) for stage in resource.stages)
        if held > 1e-6:
            assert bottleneck.ideal_images_per_second * held / run.rows <= resource.capacity * (1 + 1e-9)


@given(runs)
def test_efficiency_equals_the_utilization_of_the_bottleneck(run: StageUsage):
    bottleneck = find_bottleneck(run)
    assert bottleneck.efficiency == max(resource.utilization for resource in bottleneck.resources)
    assert bottleneck.limited_by in (*bottleneck.resources[0].stages, "nothing")


@given(busies.filter(lambda busy: busy.decode + busy.predict > 1e-3), capacities, st.floats(0.0, 5.0))
def test_perfect_schedule_has_efficiency_1(busy: Busy, capacity: Capacity, start: float):
    """The run takes exactly the busy time of its bottleneck resource."""
    inference = busy.predict + busy.predict_large
    on_cpus = busy.decode + busy.write + busy.other + (0 if capacity.gpus else inference)
    needed = [busy.driver, on_cpus / capacity.cpus, (busy.fetch + busy.decode) / capacity.fetch_slots]
    if capacity.gpus:
        needed.append(inference / capacity.gpus)
    elif capacity.predict_threads:
        needed.append(inference / capacity.predict_threads)
    if capacity.decode_threads:
        needed.append(busy.decode / capacity.decode_threads)
    # Less than a millisecond of work after seconds of startup would only test rounding.
    wall = start + max(*needed, 1e-3)
    bottleneck = find_bottleneck(StageUsage(1000, wall, start, "staged", busy, capacity))
    assert bottleneck.efficiency == pytest.approx(min(1.0, max(needed) / 1e-3), rel=1e-6)


@given(busies.filter(lambda busy: busy.decode + busy.predict > 1e-3), st.floats(1.0, 512.0))
def test_ideal_throughput_doubles_with_the_cpus_if_they_are_the_bottleneck(busy: Busy, cpus: float):
    capacity = Capacity(cpus=cpus, loaders=10**6, fetch_threads=10**6)
    run = StageUsage(1000, 100.0, 1.0, "fused", replace(busy, driver=0.0), capacity)
    once = find_bottleneck(run)
    twice = find_bottleneck(replace(run, capacity=replace(capacity, cpus=2 * cpus)))
    assert once.resources[0].name == "CPUs"
    assert twice.ideal_images_per_second == pytest.approx(2 * once.ideal_images_per_second)
    assert twice.efficiency == pytest.approx(once.efficiency / 2)


@given(runs, st.sampled_from(STAGES), st.floats(1.0, 100.0))
def test_more_expensive_stage_never_raises_the_ideal_throughput(run: StageUsage, stage: str, factor: float):
    slower = replace(run.busy, **{stage: getattr(run.busy, stage) * factor})
    assert (
        find_bottleneck(replace(run, busy=slower)).ideal_images_per_second
        <= find_bottleneck(run).ideal_images_per_second
    )


@given(runs)
def test_advice_only_names_flags_of_the_job(run: StageUsage):
    """The advice is one line for all measurements."""
    advice = find_bottleneck(run).advice
    assert advice
    assert "\n" not in advice
    assert not re.search(r"\b(nan|inf)\b", advice)
    for flag in re.findall(r"--([a-z-]+)", advice):
        assert flag.replace("-", "_") in ClassifyConfig.model_fields


@given(runs)
def test_bottleneck_is_strict_json(run: StageUsage):
    document = json.loads(find_bottleneck(run).model_dump_json(), parse_constant=pytest.fail)
    unused = set() if run.busy.predict_large else {"predict_large"}
    assert set(document["milliseconds_per_image"]) == set(STAGES) - unused


def test_fused_run_on_two_cpus():
    bottleneck = find_bottleneck(fused())
    assert bottleneck.limited_by == "predict"
    assert bottleneck.ideal_images_per_second == pytest.approx(100.0)  # 2 CPUs / 20 ms
    assert bottleneck.images_per_second_after_start == pytest.approx(100.0)
    assert bottleneck.efficiency == pytest.approx(1.0)
    assert "inference takes 85% of the CPU time" in bottleneck.advice
    assert "--engine auto" in bottleneck.advice
    assert (
        bottleneck.line()
        == "100.0 images/s after startup of 4.0 s, 100% of the ideal 100.0, limited by predict"
    )


def test_advice_names_the_cpus_that_keep_a_gpu_busy():
    bottleneck = find_bottleneck(on_gpus())
    assert bottleneck.limited_by == "decode"
    assert bottleneck.ideal_images_per_second == pytest.approx(1000.0)  # 16 CPUs / 16 ms
    assert "GPUs are busy 50% of the time" in bottleneck.advice
    assert "16 more CPUs per GPU than the current 16" in bottleneck.advice


def advice(run: StageUsage) -> str:
    return find_bottleneck(run).advice


def busy_with(stage: str) -> Busy:
    return Busy(**{stage: 38.0, "decode" if stage != "decode" else "write": 2.0})


@pytest.mark.parametrize(
    ("run", "limited_by", "words"),
    [
        (fused(busy=busy_with("decode")), "decode", ["decoding takes 95%", "19.0 ms/image"]),
        (fused(busy=busy_with("write")), "write", ["writing takes 95%", "--rows-per-file"]),
        (fused(busy=busy_with("other")), "other", ["Ray and Python", "--fragment-rows 256", "--batch-size"]),
        (fused(engine_was_measured=True), "predict", ["torch fp32 is the fastest engine that was measured"]),
        (
            fused(busy=Busy(fetch=160.0, decode=2.0, predict=30.0)),
            "fetch",
            ["80.0 ms/image with 8 in flight", "--fetch-threads from 4 to 7"],
        ),
        (fused(start_seconds=10.0), "predict", ["startup took 42% of this run (10.0 of 24.0 s)"]),
        (fused(wall_seconds=44.0), "predict", ["CPUs, the bottleneck resource, were idle 50%", "256"]),
        (
            fused(wall_seconds=44.0, fragment_rows=1024),
            "predict",
            ["2 fragments for 2 loaders", "--fragment-rows 125"],
        ),
        (on_gpus(busy=Busy(decode=400.0, predict=95.0)), "predict", ["GPUs are busy 95%", "more GPUs"]),
        (
            on_gpus(capacity=Capacity(cpus=64, loaders=14, fetch_threads=32, gpus=1, decode_threads=14)),
            "decode",
            ["14 threads while CPUs are free", "--load-tasks from 14 to 35"],
        ),
        (
            fused(shape="staged", capacity=Capacity(cpus=8, loaders=2, fetch_threads=4, predict_threads=2)),
            "predict",
            ["2 threads while CPUs are free", "--cpus-per-actor"],
        ),
        (
            on_gpus(busy=Busy(decode=400.0, predict=50.0, driver=96.0), fragment_rows=1024),
            "driver",
            ["the driver is the bottleneck with 0.960 ms/image", "--fragment-rows 2048"],
        ),
        (fused(busy=Busy()), "nothing", ["no stage recorded any work"]),
    ],
)
def test_advice_follows_from_the_measurements(run: StageUsage, limited_by: str, words: list[str]):
    bottleneck = find_bottleneck(run)
    assert bottleneck.limited_by == limited_by
    for word in words:
        assert word in bottleneck.advice


def test_advised_number_of_fetch_threads_removes_the_bottleneck():
    """With the advised number of threads, storage is no longer the bottleneck."""
    run = fused(busy=Busy(fetch=160.0, decode=2.0, predict=30.0))
    (threads,) = (int(n) for n in re.findall(r"--fetch-threads from \d+ to (\d+)", advice(run)))
    improved = find_bottleneck(replace(run, capacity=replace(run.capacity, fetch_threads=threads)))
    assert improved.limited_by == "predict"


def test_advised_number_of_cpus_removes_the_bottleneck():
    run = on_gpus()
    (more,) = (int(n) for n in re.findall(r"(\d+) more CPUs per GPU", advice(run)))
    improved = find_bottleneck(replace(run, capacity=replace(run.capacity, cpus=16.0 + more)))
    assert improved.resources[0].images_per_second == pytest.approx(
        min(resource.images_per_second for resource in improved.resources if resource.name == "GPUs"), rel=0.1
    )


def test_run_of_one_block_consists_of_startup():
    run = fused(start_seconds=24.0, start_rows=2000)
    assert run.images_per_second == pytest.approx(2000 / 24)
    assert "startup took 100%" in advice(run)


def test_rows_predicted_during_startup_are_not_counted():
    assert fused(start_rows=200).images_per_second == pytest.approx(90.0)


def test_infinite_rates_are_null_in_json():
    document = find_bottleneck(fused(busy=Busy())).model_dump(mode="json")
    assert document["ideal_images_per_second"] is None
    assert document["efficiency"] == 0.0
    assert find_bottleneck(fused()).model_dump(mode="json")["ideal_images_per_second"] == 100.0


def test_remaining_cpu_time_is_never_negative():
    assert other_seconds(10.0, 4.0, 3.5) == pytest.approx(2.5)
    assert other_seconds(10.0, 6.0, 4.1) == 0.0


@pytest.mark.parametrize(
    "make",
    [
        lambda: Busy(decode=-1.0),
        lambda: Busy(fetch=math.nan),
        lambda: Capacity(cpus=0, loaders=1, fetch_threads=1),
        lambda: Capacity(cpus=1, loaders=0, fetch_threads=1),
        lambda: Capacity(cpus=1, loaders=1, fetch_threads=1, gpus=-1),
        lambda: fused(rows=0),
        lambda: fused(start_rows=2001),
        lambda: fused(start_seconds=25.0),
        lambda: fused(wall_seconds=0.0, start_seconds=0.0),
    ],
)
def test_invalid_measurements_are_rejected(make):
    with pytest.raises(ValueError, match=r"invalid|not a finite|needs CPUs|below 0"):
        make()


def printed(bottleneck: Bottleneck) -> list[str]:
    console = Console(width=80)
    with console.capture() as captured:
        console.print(bottleneck_table(bottleneck))
    return captured.get().splitlines()


def test_table_marks_the_bottleneck_stage():
    lines = printed(find_bottleneck(fused()))
    (marked,) = (line for line in lines if "bottleneck" in line)
    assert marked.split() == ["predict", "17.00", "85%", "2", "CPUs", "117.6", "bottleneck"]
    (total,) = (line.split() for line in lines if line.startswith("CPUs "))
    assert total == ["CPUs", "20.00", "100%", "2", "CPUs", "100.0"]
    assert len([line for line in lines if line.startswith("in flight ")]) == 1
    assert not any("…" in line for line in lines)


def test_table_of_a_gpu_run_names_the_resource_of_each_stage():
    lines = {line.split()[0]: line for line in printed(find_bottleneck(on_gpus()))}
    assert "GPUs" in lines["predict"]
    assert "images in flight" in lines["fetch"]
    assert "bottleneck" in lines["decode"]
