"""Data of a run report with every section filled, including hostile strings."""

from datetime import UTC, datetime
from itertools import pairwise

from batchcls.report.run_page_data import (
    BINS,
    BaselineFacts,
    Category,
    CategoryMix,
    Changes,
    Confidence,
    LabelFlow,
    MappedLabel,
    PredictedRow,
    PublishStatus,
    QuarantinedRow,
    QuarantineGroup,
    RunFacts,
    Text,
)
from batchcls.runs.bottleneck import Bottleneck
from batchcls.runs.records import GateResult, Measurements
from batchcls.runs.utilization import STAGES, Resource
from batchcls.schema import Reason

ATTACK = "<script>document.title = 'taken'</script><img src=x onerror=\"document.title='taken'\">"
LINES = 'SKU 1\r\n"><b>bold</b>\u202etxt.exe'
LABELS = ("chairs", "lamps / desk", "<i>mugs</i> & 'cups'", "shoes", "a_long_way_to_a_label/" * 20)


def text(value: str | None) -> Text:
    return Text(None, 0) if value is None else Text(value[:300], len(value))


def item(
    row: int, item_id: str | None = None, probability: float = 0.5, label: str = "chairs"
) -> PredictedRow:
    return PredictedRow(
        row=row,
        item_id=text(item_id or f"SKU-{row:06d}"),
        label=label,
        probability=probability,
        runner_up=("lamps / desk", probability / 3),
        uri=text(f"https://user:secret@shop.example/{row}.jpg?token=hidden"),
        content_hash="0" * 64,
    )


def failed(row: int, item_id: str | None, detail: str = "the data ends early") -> QuarantinedRow:
    return QuarantinedRow(row, text(item_id), text(f"s3://shop/{row}.jpg"), detail, 20_000, 2, "0" * 64)


def full_facts() -> RunFacts:
    """A run with every section of the page filled; rows 0 to 99 have images."""
    categories = tuple(Category(label, 90 - 9 * i, 80 - 3 * i, 0.7) for i, label in enumerate(LABELS))
    return RunFacts(
        run_id="20261125-033000-4f2a",
        committed=datetime(2026, 11, 25, 3, 41, tzinfo=UTC),
        publish_status=PublishStatus(
            False, "Not published: a gate failed", "12 % of the labels changed; 10 % are allowed."
        ),
        gates=(
            GateResult(
                gate="failed_fraction", value=0.004, limit=0.01, passed=True, message="4 of 1000 rows failed"
            ),
            GateResult(
                gate="changed_labels_fraction",
                value=0.12,
                limit=0.1,
                passed=False,
                message="12 % of the labels changed",
            ),
        ),
        rows=1000,
        predicted=700,
        reused=200,
        reheaded=0,
        shared=0,
        quarantine_groups=tuple(
            QuarantineGroup(reason.value, 3, (failed(200 + i, f"SKU-{i}"), failed(300 + i, None, ATTACK)))
            for i, reason in enumerate(Reason)
        ),
        measurements=Measurements(
            images_per_second=120.0,
            seconds_total=75.0,
            bottleneck=Bottleneck(
                shape="fused",
                device="cpu",
                limited_by="predict",
                ideal_images_per_second=240.0,
                images_per_second_after_start=180.0,
                efficiency=0.75,
                start_seconds=20.0,
                milliseconds_per_image={stage: 1.5 * i for i, stage in enumerate(STAGES, 1)},
                resources=(
                    Resource(
                        name="CPUs",
                        limits="predict",
                        stages=STAGES,
                        capacity=8.0,
                        milliseconds=31.5,
                        images_per_second=240.0,
                        utilization=0.75,
                    ),
                ),
                advice="another engine",
            ),
        ),
        confidence=Confidence(
            bins=tuple(range(BINS)),
            mean=0.71,
            bins_before=tuple(range(BINS, 0, -1)),
            mean_before=0.74,
            least_confident=(item(0, ATTACK, 0.01), item(1, LINES, 0.02), item(2, "A" * 1_000_000, 0.03)),
            most_confident=tuple(item(row, probability=0.99) for row in range(10, 20)),
        ),
        categories=CategoryMix(
            count=500,
            predictions=900,
            predictions_before=880,
            largest=categories,
            moved=categories[:3],
            examples=tuple(
                (entry, tuple(item(20 + 4 * i + j) for j in range(4))) for i, entry in enumerate(categories)
            ),
        ),
        changes=Changes(
            run_id="20261124-033000-11aa",
            same=790,
            changed=100,
            new=10,
            removed=5,
            flows=tuple(
                LabelFlow(old, new, 30 - i, tuple(item(50 + 4 * i + j, label=new) for j in range(4)))
                for i, (old, new) in enumerate(pairwise(LABELS))
            ),
            flow_count=44,
            causes=(("another model", 90), ("another image", 10)),
            mapped=12,
        ),
        label_map=(
            MappedLabel("renamed", (ATTACK,), LABELS[2], 9, 8),
            MappedLabel("merged", (*LABELS, *LABELS[3:]), "furniture", 1234, 567),
            MappedLabel("retired", ("gift cards",), None, 0, 3),
            MappedLabel("split", ("shoes",), LABELS[4], 5, None),
        ),
        facts=(("Manifest", "s3://shop/catalog/"), ("Model", ATTACK)),
        folder="s3://shop/classified/runs/20261125-033000-4f2a",
        before=BaselineFacts("20261124-033000-11aa", 990, 5, 110.0),
    )
