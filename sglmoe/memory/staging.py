"""What decoding packed experts takes of a device beside their frames: copies of them, as they are stored. Pure."""

from sglmoe.units import ceil_div

# Arbitrary: so many experts are decoded in one launch at most, and have room in packed form on the device.
NUM_STAGED = 8
# What the decoder's loads and stores of whole words need.
ALIGN_BYTES = 16


def row_bytes(stored_bytes: int) -> int:
    """What one expert takes; `stored_bytes`: of the largest, as it is stored."""
    return ceil_div(stored_bytes, ALIGN_BYTES) * ALIGN_BYTES


def decoding_bytes(stored_bytes: int) -> int:
    """What all take that have room at a time: those of demand loads, and one that is prefetched."""
    return (NUM_STAGED + 1) * row_bytes(stored_bytes)
