"""Makes the decoder crash or hang on files with certain markers; tests put this folder on PYTHONPATH."""

import ctypes
import hashlib
import importlib.abc
import importlib.util
import sys
from types import ModuleType
from typing import Any

CRASH = b"ends its decoder"
EXHAUST_MEMORY = b"takes all memory"
HANG = b"never comes back"
ALLOCATED = []


def _patch(module: ModuleType) -> None:
    decode = module.decode

    def patched(data: bytes, *arguments: Any) -> Any:
        if CRASH in data:
            ctypes.string_at(0)
        if EXHAUST_MEMORY in data:
            while True:
                ALLOCATED.append(bytearray(64 << 20))
        if HANG in data:
            hashlib.pbkdf2_hmac("sha256", b"", b"", (1 << 31) - 1)
        return decode(data, *arguments)

    module.decode = patched  # type: ignore[attr-defined]


class _Finder(importlib.abc.MetaPathFinder):
    def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
        if name != "batchcls.images.decode":
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        sys.meta_path.insert(0, self)
        if spec is None or spec.loader is None:
            return None
        execute = spec.loader.exec_module

        def exec_module(module: ModuleType) -> None:
            execute(module)
            _patch(module)

        spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


if __name__ == "sitecustomize":
    sys.meta_path.insert(0, _Finder())
