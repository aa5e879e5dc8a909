"""How packed experts lie in memory, and what decoding them takes of a device beside their frames: copies of them. Pure."""

from sglmoe.units import ceil_div

# Arbitrary: so many experts are decoded in one launch at most, and have room in packed form on the device.
NUM_STAGED = 8
# What the decoder's loads and stores of whole words need.
ALIGN_BYTES = 16
# What a GPU asks host memory for at a time, and a divisor of the bytes of a packed tensor's tile.
LINE_BYTES = 128


def slot_bytes(packed_bytes: int) -> int:
    """What a packed tensor takes of memory. It ends where its slot does, so its tiles, which come last, are whole lines."""
    return ceil_div(packed_bytes, LINE_BYTES) * LINE_BYTES


def row_bytes(stored_bytes: int) -> int:
    """What one expert takes; `stored_bytes`: of the largest, as it is stored."""
    return ceil_div(stored_bytes, ALIGN_BYTES) * ALIGN_BYTES


def decoding_bytes(stored_bytes: int) -> int:
    """What all take that have room at a time: those of demand loads, and one that is prefetched."""
    return (NUM_STAGED + 1) * row_bytes(stored_bytes)
