"""On the PYTHONPATH of tests: files that contain one of the marks crash or hang the process that decodes them."""

import ctypes
import hashlib
import importlib.abc
import importlib.util
import sys
from types import ModuleType
from typing import Any

DEADLY = b"ends its decoder"
GREEDY = b"takes all memory"
ENDLESS = b"never comes back"
HOLDING = []


def _break(module: ModuleType) -> None:
    decode = module.decode

    def deadly(data: bytes, *arguments: Any) -> Any:
        if DEADLY in data:
            ctypes.string_at(0)
        if GREEDY in data:
            while True:
                HOLDING.append(bytearray(64 << 20))
        if ENDLESS in data:
            hashlib.pbkdf2_hmac("sha256", b"", b"", (1 << 31) - 1)
        return decode(data, *arguments)

    module.decode = deadly  # type: ignore[attr-defined]


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
            _break(module)

        spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


if __name__ == "sitecustomize":
    sys.meta_path.insert(0, _Finder())
