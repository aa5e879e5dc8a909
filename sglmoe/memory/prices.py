"""The one currency: what a byte of each kind saves when it is there, in seconds."""

from sglmoe.memory.arena import Geometry

# Arbitrary, until something has been measured.
FIRST_BYTES_PER_SECOND = 10e9
FIRST_TOKEN_SECONDS = 2e-4


class Prices:
    """What it costs to bring things back, as last measured on this machine."""

    def __init__(self, geometry: Geometry):
        self._geometry = geometry
        self.expert_seconds = geometry.expert_bytes / FIRST_BYTES_PER_SECOND  # to load one
        self.token_seconds = FIRST_TOKEN_SECONDS  # to prefill one, stalls not counted

    @property
    def expert_byte(self) -> float:
        """Seconds that each byte of a resident expert saves when it is used."""
        return self.expert_seconds / self._geometry.frame_bytes

    @property
    def kv_byte(self) -> float:
        """Seconds that each byte of a cached prefix saves when it is found again."""
        return self.token_seconds * self._geometry.page_tokens / self._geometry.page_bytes
