"""Where tensors lie in blocks of host memory that hold experts as they are stored, for a device that decodes them."""

import numpy as np
import numpy.typing as npt

from sglmoe.kernels.exponent_codec.layout import HEADER_BYTES, Bytes, Form, read_layout
from sglmoe.kernels.exponent_codec.page_in_packed import NOT_CODED, VECTOR_BYTES, PackedBlocks
from sglmoe.memory.host_tier import HostTier
from sglmoe.memory.store import ExpertStore, StoredPart


def new_packed_blocks(tier: HostTier, store: ExpertStore, device: str) -> PackedBlocks:
    """Of a tier that may hold nothing yet. All experts have tensors of the same sizes, in the same places of a frame."""
    parts = store.stored_parts(*store.experts()[0])
    in_frame = [(part.offset, part.num_bytes) for part in parts]
    return PackedBlocks.empty(in_frame, len(tier.blocks), device)


def where_stored(tier: HostTier, store: ExpertStore) -> npt.NDArray[np.int32]:
    """`PackedBlocks.stored` of a tier that holds all experts: int32 `[num_blocks, P, 2]`."""
    num_parts = len(store.part_names)
    places: npt.NDArray[np.int32] = np.zeros((len(tier.blocks), num_parts, 2), np.int32)
    for (layer, expert), block in np.ndenumerate(tier.block_table()):
        parts = store.stored_parts(layer, expert)
        places[block] = [_place(part, tier.blocks[block]) for part in parts]
    assert not (places[..., 0] % VECTOR_BYTES).any()
    return places


def _place(part: StoredPart, block: Bytes) -> tuple[int, int]:
    if not part.is_packed:
        return part.stored_offset, NOT_CODED
    its = read_layout(block[part.stored_offset :][:HEADER_BYTES])
    if its.form is Form.RAW:
        return part.stored_offset + its.tiles, NOT_CODED
    return part.stored_offset, its.num_escapes
