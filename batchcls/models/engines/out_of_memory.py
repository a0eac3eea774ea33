"""Which exceptions say that memory ran out. Needs no torch."""

_WORDS = ("can't allocate memory", "out of memory", "not enough memory")


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an exception says that memory ran out, of a GPU or of the machine.

    PyTorch has a type of its own for a GPU, which need not be imported to be known by its name; on a
    CPU it says so with a plain RuntimeError.
    """
    if isinstance(error, MemoryError):
        return True
    if any(kind.__name__ == "OutOfMemoryError" for kind in type(error).__mro__):
        return True
    return isinstance(error, RuntimeError) and any(words in str(error).lower() for words in _WORDS)
