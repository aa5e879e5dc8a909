"""Numbers with units: bytes and shares as people write them, and back."""

import re

_MULTIPLES = {
    "": 1,
    "k": 10**3,
    "m": 10**6,
    "g": 10**9,
    "t": 10**12,
    "ki": 2**10,
    "mi": 2**20,
    "gi": 2**30,
    "ti": 2**40,
}
_BYTES = re.compile(r"([0-9]+(?:\.[0-9]+)?)\s*([kmgt]?i?)b?", re.IGNORECASE)
_PERCENT = re.compile(r"([0-9]+(?:\.[0-9]+)?)\s*%")


def parse_bytes(text: str, *, whole_bytes: int) -> int:
    """Read ``"24GiB"``, ``"800 MB"``, ``"123456"`` or a share such as ``"80%"`` of `whole_bytes`.

    Raises ValueError, with examples, for anything else and for nothing at all.
    """
    if match := _PERCENT.fullmatch(text.strip()):
        share = float(match[1]) / 100
        if not 0 < share <= 1:
            raise ValueError(f"{text!r} is not a share between 0% and 100%")
        return int(whole_bytes * share)
    match = _BYTES.fullmatch(text.strip())
    if not match or match[2].lower() not in _MULTIPLES:
        raise ValueError(f"{text!r} is not a size; write for example 24GiB, 800MB, 123456 or 80%")
    size_bytes = int(float(match[1]) * _MULTIPLES[match[2].lower()])
    if size_bytes <= 0:
        raise ValueError(f"{text!r} is no memory at all; write for example 24GiB or 80%")
    return size_bytes


def show_bytes(size_bytes: float) -> str:
    """Write a size for people: ``1536`` becomes ``"1.50 KiB"``."""
    size = float(size_bytes)
    for suffix in ("B", "KiB", "MiB", "GiB"):
        if abs(size) < 1024:
            return f"{size:.0f} {suffix}" if suffix == "B" else f"{size:.2f} {suffix}"
        size /= 1024
    return f"{size:.2f} TiB"


def ceil_div(numerator: int, denominator: int) -> int:
    """The smallest integer not below ``numerator / denominator``."""
    return -(-numerator // denominator)
