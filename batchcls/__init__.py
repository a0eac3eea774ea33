"""Classify whole image catalogs nightly on Ray.

    import batchcls

    run = batchcls.classify("catalog.parquet", model="timm:mobilenetv3_large_100", output="out")
    run.predictions().to_table(columns=["item_id", "label", "probability"])

The names below are imported on first use, so `import batchcls` takes milliseconds.
"""

from typing import TYPE_CHECKING, Any

from batchcls.models.deferred_compiler import defer_compiler

if TYPE_CHECKING:
    from batchcls.api import Run, classify, open_run
    from batchcls.errors import BatchclsError, BudgetExceeded, InputError, PublishRefused, StorageStoppedError

__version__ = "0.1.0"

__all__ = [
    "BatchclsError",
    "BudgetExceeded",
    "InputError",
    "PublishRefused",
    "Run",
    "StorageStoppedError",
    "__version__",
    "classify",
    "open_run",
]

defer_compiler()


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from batchcls import api, errors  # noqa: PLC0415 - see above

    return getattr(errors, name, None) or getattr(api, name)


def __dir__() -> list[str]:
    return __all__
