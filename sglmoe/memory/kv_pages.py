"""Pages within the KV frames.

A page of a KV frame is free, held (a running request needs it) or idle (a cached prefix that nobody
uses now). The pool counts; who the page belongs to is the business of the radix tree and of the
requests.
"""

from array import array
from collections.abc import Iterator
from typing import TypeAlias

import numpy as np

from sglmoe.memory.arena import Frames

# int32; sliced, joined and seen by numpy at the speed of memcpy, whatever the length of a prompt.
Pages: TypeAlias = "array[int]"


def no_pages() -> Pages:
    return array("i")


class _ByRoom:
    """Frames by how many pages are free in them; every operation is O(1)."""

    def __init__(self, pages_per_frame: int):
        self._frames: list[dict[int, None]] = [{} for _ in range(pages_per_frame + 1)]
        self._rooms = 0  # bit n: there is a frame with n free pages

    def move(self, frame: int, before: int, after: int) -> None:
        """A frame's free pages become `after`; 0 stands for a frame that is not here."""
        if before:
            del self._frames[before][frame]
            if not self._frames[before]:
                self._rooms ^= 1 << before
        if after:
            self._frames[after][frame] = None
            self._rooms |= 1 << after

    def roomiest(self) -> int | None:
        """The frame with most free pages; of equals the one that has been so longest."""
        return next(iter(self._frames[self._rooms.bit_length() - 1])) if self._rooms else None

    def content(self) -> dict[int, int]:
        return {frame: room for room, frames in enumerate(self._frames) for frame in frames}


class PagePool:
    """Hands out pages: those of one request from as few frames as can be, so that frames run empty
    when it is forgotten; an empty frame is FREE at once."""

    def __init__(self, frames: Frames, *, pages_per_frame: int, max_frames: int):
        self._frames = frames
        self._pages_per_frame = pages_per_frame
        self._max_frames = max_frames
        self._free: dict[int, Pages] = {}  # of the partly used frames
        self._by_room = _ByRoom(pages_per_frame)  # these frames
        self._held = [0] * len(frames)  # held pages by frame
        self.free_pages = 0  # in KV frames
        self.held_pages = 0
        self.idle_frames = 0  # KV frames without a held page: evicting prefixes can empty these

    @property
    def available_pages(self) -> int:
        """What `allocate` can hand out, free frames included as far as KV may take them."""
        num_frames = min(self._frames.num_free, self._max_frames - self._frames.num_kv)
        return self.free_pages + num_frames * self._pages_per_frame

    def most_pages(self, num_frames: int) -> int:
        """What `allocate` could hand out if only held pages and all but so many frames stayed."""
        return min(self._max_frames, num_frames) * self._pages_per_frame - self.held_pages

    @property
    def idle_pages(self) -> int:
        num_pages = self._frames.num_kv * self._pages_per_frame
        return num_pages - self.free_pages - self.held_pages

    @property
    def may_grow(self) -> bool:
        """Whether KV may take one more frame, should one become free."""
        return self._frames.num_kv < self._max_frames

    def allocate(self, num_pages: int, *, after: int | None = None) -> Pages:
        """Take `num_pages` free pages, at most `available_pages`; they are held from now on.

        `after` is the page that they follow. They lie in its frame as far as there is room; then more
        than half a frame of them begins a free one; the rest goes to the roomiest of the partly used
        frames, and to a free one if there is none.
        """
        assert num_pages <= self.available_pages, f"{num_pages} of {self.available_pages} pages"
        pages = no_pages()
        frame = -1 if after is None else after // self._pages_per_frame
        while (num_missing := num_pages - len(pages)) > 0:
            if frame not in self._free:
                frame = self._next_frame(num_missing)
            free = self._free[frame]
            taken = free[:num_missing]
            del free[:num_missing]
            self._note_room(frame, len(free) + len(taken), len(free))
            pages += taken
            self._count_held(frame, len(taken))
        self.free_pages -= num_pages
        return pages

    def free(self, pages: Pages) -> None:
        """Idle pages become free."""
        for frame, start, stop in self._runs(pages):
            free = self._free.setdefault(frame, no_pages())
            free += pages[start:stop]
            self._note_room(frame, len(free) - (stop - start), len(free))
            self.free_pages += stop - start
            if len(free) == self._pages_per_frame:
                self._close_frame(frame)

    def hold(self, pages: Pages) -> None:
        """Idle pages become held."""
        for frame, start, stop in self._runs(pages):
            self._count_held(frame, stop - start)

    def unhold(self, pages: Pages) -> None:
        """Held pages become idle."""
        for frame, start, stop in self._runs(pages):
            self._count_held(frame, start - stop)

    def held_frames(self) -> Iterator[int]:
        """Frames that running requests have pages in."""
        return (frame for frame, held in enumerate(self._held) if held)

    def num_idle(self, frame: int) -> int:
        """The idle pages of a KV frame."""
        num_free = len(self._free.get(frame, ()))
        return self._pages_per_frame - num_free - self._held[frame]

    def num_to_empty(self, frame: int) -> int:
        """How many pages to evict for a KV frame to run empty; 0 if one of its pages is held."""
        return 0 if self._held[frame] else self.num_idle(frame)

    def violations(self, *, held: Pages, idle: Pages) -> list[str]:
        """Pages free + held + idle = pages of KV frames. `held` and `idle`: all pages that have an
        owner, by state."""
        frames_held = [0] * len(self._frames)
        for page in held:
            frames_held[page // self._pages_per_frame] += 1
        free = [page for pages in self._free.values() for page in pages]
        used = [*held, *idle]
        kv_frames = {page // self._pages_per_frame for page in used}
        pages = [
            frame * self._pages_per_frame + page
            for frame in sorted(kv_frames)
            for page in range(self._pages_per_frame)
        ]
        found = []
        if sorted([*free, *used]) != pages:
            found.append("free, held and idle pages are not the pages of the KV frames")
        if len(kv_frames) != self._frames.num_kv:
            found.append(f"{len(kv_frames)} frames have pages in use, {self._frames.num_kv} are KV")
        counted = (self.free_pages, self.held_pages, self.idle_pages)
        if (exact := (len(free), len(held), len(idle))) != counted:
            found.append(f"free, held, idle pages are counted as {counted} but are {exact}")
        if frames_held != self._held:
            found.append("held pages by frame are counted wrong")
        if sum(not frames_held[frame] for frame in kv_frames) != self.idle_frames:
            found.append(f"idle frames are counted wrong: {self.idle_frames}")
        if self._by_room.content() != {frame: len(free) for frame, free in self._free.items()}:
            found.append("partly used frames are not sorted by their free pages")
        if self._frames.num_kv > self._max_frames:
            found.append(f"{self._frames.num_kv} KV frames exceed {self._max_frames}")
        return found

    def _next_frame(self, num_pages: int) -> int:
        roomiest = self._by_room.roomiest()
        is_worth_one = 2 * num_pages > self._pages_per_frame
        if roomiest is None or (is_worth_one and self._frames.num_free and self.may_grow):
            return self._open_frame()
        return roomiest

    def _note_room(self, frame: int, before: int, after: int) -> None:
        """So many pages of the frame were free, and are."""
        self._by_room.move(frame, before, after)
        if not after:
            del self._free[frame]

    def _open_frame(self) -> int:
        frame = self._frames.take_for_kv()
        first = frame * self._pages_per_frame
        self._free[frame] = array("i", range(first, first + self._pages_per_frame))
        self._by_room.move(frame, 0, self._pages_per_frame)
        self.free_pages += self._pages_per_frame
        self.idle_frames += 1
        return frame

    def _close_frame(self, frame: int) -> None:
        assert not self._held[frame], f"frame {frame} is empty, yet held"
        self._note_room(frame, self._pages_per_frame, 0)
        self.free_pages -= self._pages_per_frame
        self.idle_frames -= 1
        self._frames.give(frame)

    def _count_held(self, frame: int, change: int) -> None:
        before = self._held[frame]
        after = before + change
        assert after >= 0, f"frame {frame} holds {before} pages, {-change} are let go"
        self._held[frame] = after
        self.held_pages += change
        self.idle_frames += (not after) - (not before)

    def _runs(self, pages: Pages) -> Iterator[tuple[int, int, int]]:
        """Cut `pages` into (frame, start, stop) where the frame changes."""
        if not pages:
            return
        frames = np.frombuffer(pages, np.int32) // self._pages_per_frame
        cuts = (np.flatnonzero(frames[1:] != frames[:-1]) + 1).tolist()
        starts = [0, *cuts]
        yield from zip(frames[starts].tolist(), starts, [*cuts, len(pages)], strict=True)
