"""The one currency: what a byte of each kind saves when it is there, in seconds."""

from sglmoe.memory.arena import Geometry

# Arbitrary, until something has been measured.
FIRST_BYTES_PER_SECOND = 10e9
FIRST_TOKEN_SECONDS = 2e-4


class Prices:
    """What it costs to bring things back, as last measured on this machine.

    In whole nanoseconds, which a routing trace can hold.
    """

    def __init__(self, geometry: Geometry):
        self._geometry = geometry
        self.expert_nanoseconds = round(1e9 * geometry.expert_bytes / FIRST_BYTES_PER_SECOND)
        self.token_nanoseconds = round(1e9 * FIRST_TOKEN_SECONDS)

    def set(self, *, expert_nanoseconds: int, token_nanoseconds: int) -> None:
        """To load an expert, and to prefill a token, stalls not counted."""
        self.expert_nanoseconds = expert_nanoseconds
        self.token_nanoseconds = token_nanoseconds

    @property
    def expert_byte(self) -> float:
        """Seconds that each byte of a resident expert saves when it is used."""
        return 1e-9 * self.expert_nanoseconds / self._geometry.frame_bytes

    @property
    def kv_byte(self) -> float:
        """Seconds that each byte of a cached prefix saves when it is found again."""
        return (
            1e-9 * self.token_nanoseconds * self._geometry.page_tokens / self._geometry.page_bytes
        )
