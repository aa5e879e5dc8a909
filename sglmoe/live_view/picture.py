"""The live view in a terminal: from a `LiveState` to something that rich prints. Pure functions.

Colours say nothing that letters and blocks don't, so that a file or a screen without colours will do.
"""

from collections import Counter
from collections.abc import Mapping, Sequence

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from sglmoe.live_view.state import LiveState, Map, Memory, Rates
from sglmoe.units import ceil_div, show_bytes

Kinds = Mapping[str, tuple[str, str]]

NOTHING = "-"
FRAMES: Kinds = {  # letter -> what it says, colour
    "e": ("experts", "cyan"),
    "l": ("on their way", "magenta"),
    "p": ("packed experts", "blue"),
    "k": ("KV of running requests", "yellow"),
    "c": ("cached KV", "green"),
    ".": ("free", "bright_black"),
}
EXPERTS: Kinds = {
    "r": ("in a frame", "cyan"),
    "a": ("there ahead of use", "green"),
    "l": ("on its way", "magenta"),
    "p": ("packed in a frame", "blue"),
    "h": ("in host memory", "yellow"),
    ".": ("in the checkpoint", "bright_black"),
}
BLOCKS = "▁▂▃▄▅▆▇█"
MAX_FRAME_ROWS = 6
MAX_EXPERT_ROWS = 24


def picture(state: LiveState, *, width: int, kv_shares: Sequence[float] = ()) -> RenderableType:
    """`kv_shares`: of all frames, those that had KV, the oldest first."""
    parts: list[RenderableType] = [headline(state), figures(state)]
    parts.append(split(state.memory, width=width, kv_shares=kv_shares))
    if state.map is None:
        parts.append(Text("no map: no worker has drawn one yet", style="yellow"))
    else:
        parts += [frames(state.map, width=width), experts(state.map, width=width)]
    return Group(*parts)


def headline(state: LiveState) -> Text:
    """Who serves what, for how long, and how the worker is."""
    worker = state.worker
    text = Text("sglmoe", style="bold")
    text.append(f"  {state.model.rstrip('/').rpartition('/')[2]}", style="default not bold")
    text.append(f"  up {show_seconds(state.uptime_seconds)}  ", style="default not bold")
    if worker.state == "running":
        text.append("worker running", style="green")
    else:
        text.append(f"worker restarting for {show_seconds(worker.lost_seconds)}", style="red")
    if state.requests.paused:
        text.append("  paused", style="yellow")
    if worker.restarts:
        took = show_seconds(worker.restart_seconds)
        text.append(f"  restarts {worker.restarts}, the last took {took}", style="yellow not bold")
    if worker.cause:
        text.append(f"\n{worker.cause.strip().splitlines()[-1]}", style="yellow not bold")
    return text


def figures(state: LiveState) -> Table:
    """Numbers in four pairs of columns."""
    table = Table.grid(padding=(0, 2))
    for _ in range(4):
        table.add_column(style="bright_black")
        table.add_column(justify="right")
    for row in zip(*[iter(pairs_of(state))] * 4, strict=True):
        table.add_row(*(cell for pair in row for cell in pair))
    return table


def pairs_of(state: LiveState) -> list[tuple[str, str]]:
    requests, counters = state.requests, state.counters
    rates, needed = lately(state.rates), counters.expert_hits + counters.expert_misses
    since_start = counters.expert_hits / needed if needed else None
    moved = rates["expert_bytes_per_second"]
    return [
        ("output", per_second(rates["decode_tokens_per_second"])),
        ("running", str(requests.running)),
        ("expert hits", percent(rates["hit_ratio"])),
        ("prefetch", "on" if state.prefetch.is_on else state.prefetch.mode),
        ("prompts", per_second(rates["prompt_tokens_per_second"])),
        ("waiting", str(requests.queued + requests.preparing)),
        ("since start", percent(since_start)),
        ("precision", percent(state.prefetch.precision)),
        ("busy", percent(rates["busy_ratio"])),
        ("limit", str(requests.running_limit)),
        ("stalled", percent(rates["stall_ratio"])),
        ("moved", NOTHING if moved is None else f"{show_bytes(moved)}/s"),
    ]


def split(memory: Memory, *, width: int, kv_shares: Sequence[float]) -> Text:
    """The arena's frames as one bar, and how much of it was KV until now."""
    counts = {
        **{"e": memory.expert_frames, "p": memory.packed_frames},
        **{"k": memory.kv_frames, ".": memory.free_frames},
    }
    arena = show_bytes(memory.num_frames * memory.frame_bytes)
    text = Text(f"\nArena {arena}: {memory.num_frames} frames of {show_bytes(memory.frame_bytes)}")
    used = memory.locked_pages * memory.page_tokens
    cached = memory.cached_pages * memory.page_tokens
    text.append(f"; KV of {used} tokens in use, {cached} cached\n")
    for letter, cells in zip(counts, shares_of(list(counts.values()), width), strict=True):
        text.append(letter * cells, style=FRAMES[letter][1])
    if kv_shares:
        latest = kv_shares[-max(1, width - 10) :]
        text.append("\nKV so far ", style="bright_black")
        text.append("".join(block(share) for share in latest), style=FRAMES["k"][1])
    return text


def frames(drawn: Map, *, width: int) -> Text:
    """The map of the arena; where it is large a letter stands for several frames, most of which are that."""
    letters = squeeze(drawn.frames, MAX_FRAME_ROWS * width)
    each = ceil_div(len(drawn.frames), max(1, len(letters)))
    text = Text(f"\nFrames, {each} a letter\n" if each > 1 else "\nFrames\n")
    counts = {letter: drawn.frames.count(letter) for letter in FRAMES}
    text.append_text(legend(FRAMES, counts, width=width))
    for start in range(0, len(letters), width):
        text.append("\n")
        for letter in letters[start : start + width]:
            text.append(letter, style=FRAMES[letter][1])
    return text


def experts(drawn: Map, *, width: int) -> Text:
    """A row a layer, a block an expert: how high says how hot, the colour where it is."""
    if not drawn.residency:
        return Text("\nNo experts: a dense model")
    rows = ceil_div(len(drawn.residency), MAX_EXPERT_ROWS)
    columns = ceil_div(len(drawn.residency[0]), max(1, width - 5))
    measure = "share of recent steps" if drawn.heat_is == "share" else "rank by use"
    text = Text(f"\nExperts by layer, as high as their {measure}\n")
    counts = Counter("".join(drawn.residency))
    text.append_text(legend(EXPERTS, counts, width=width))
    for first in range(0, len(drawn.residency), rows):
        text.append(f"\n{first:4} ", style="bright_black")
        for left in range(0, len(drawn.residency[0]), columns):
            states = [row[left : left + columns] for row in drawn.residency[first : first + rows]]
            heats = [row[left : left + columns] for row in drawn.heat[first : first + rows]]
            hottest = max(int(digit, 36) for heat in heats for digit in heat)
            text.append(block(hottest / 35), style=EXPERTS[most_common("".join(states))][1])
    return text


def legend(kinds: Kinds, counts: Mapping[str, int], *, width: int) -> Text:
    """Names and counts; lines break between entries."""
    text, column = Text(), 0
    for letter, (name, style) in kinds.items():
        sign = f"{letter} " if kinds is FRAMES else ""
        entry = f"{sign}{name} {counts.get(letter, 0)}"
        if column and column + len(entry) > width:
            text.append("\n")
            column = 0
        text.append(entry + "  ", style=style)
        column += len(entry) + 2
    return text


# --------------------------------------------------------------------------------------------------------------- cells


def squeeze(letters: str, max_cells: int) -> str:
    """At most so many letters, each for equally many: the most common of them."""
    each = ceil_div(len(letters), max(1, max_cells)) or 1
    return "".join(
        most_common(letters[start : start + each]) for start in range(0, len(letters), each)
    )


def most_common(letters: str) -> str:
    return Counter(letters).most_common(1)[0][0]


def shares_of(counts: Sequence[int], cells: int) -> list[int]:
    """So many cells in all, divided as `counts` are; ends are rounded, so that no cell is lost."""
    total = max(1, sum(counts))
    ends = [round(sum(counts[: i + 1]) * cells / total) for i in range(len(counts))]
    return [end - start for start, end in zip([0, *ends], ends, strict=False)]


def block(share: float) -> str:
    return BLOCKS[min(len(BLOCKS) - 1, int(share * len(BLOCKS)))]


# --------------------------------------------------------------------------------------------------------------- words


def lately(rates: Rates | None) -> dict[str, float | None]:
    """By field; None for each where nothing is known."""
    return {name: getattr(rates, name, None) for name in Rates.__struct_fields__}


def per_second(tokens: float | None) -> str:
    return NOTHING if tokens is None else f"{tokens:.1f} tok/s"


def percent(share: float | None) -> str:
    return NOTHING if share is None else f"{100 * share:.1f} %"


def show_seconds(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes = int(seconds) // 60
    return f"{minutes} min" if minutes < 120 else f"{minutes // 60} h"
