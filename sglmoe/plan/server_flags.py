"""Flags that say how a budget is cut, SGLang's most of them: taken by a plan as by the server, and handed on in its command."""

import argparse
from collections.abc import Iterator, Sequence

import msgspec

from sglmoe.config import AUTO, parse_packed_experts
from sglmoe.decode_graphs import GraphFlags
from sglmoe.flags import VALUES, flag_name


class ServerFlags(msgspec.Struct, frozen=True, kw_only=True):
    """As they were given; None leaves it to the server."""

    dtype: str = "auto"
    page_size: int | None = None
    max_running_requests: int | None = None
    context_length: int | None = None
    graphs: GraphFlags = GraphFlags()
    packed_experts: str = AUTO


def add_server_flags(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("as the server takes them")
    group.add_argument("--dtype", default="auto")
    for name in ("page_size", "max_running_requests", "context_length"):
        group.add_argument(flag_name(name), type=int)
    backends = [str(value) for value in VALUES["cuda_graph_backend_decode"]]
    group.add_argument("--cuda-graph-backend-decode", choices=backends)
    group.add_argument("--cuda-graph-bs-decode", type=int, nargs="+", default=())
    group.add_argument("--cuda-graph-max-bs-decode", type=int)
    group.add_argument("--disable-cuda-graph-padding", action="store_true")
    group.add_argument("--packed-experts", metavar="WHICH")


def server_flags(options: argparse.Namespace) -> ServerFlags:
    """What `add_server_flags` has parsed. Raises ValueError."""
    return ServerFlags(
        dtype=options.dtype,
        page_size=options.page_size,
        max_running_requests=options.max_running_requests,
        context_length=options.context_length,
        graphs=GraphFlags(
            backend=options.cuda_graph_backend_decode,
            sizes=tuple(options.cuda_graph_bs_decode),
            max_size=options.cuda_graph_max_bs_decode,
            no_padding=options.disable_cuda_graph_padding,
        ),
        packed_experts=parse_packed_experts(options.packed_experts),
    )


def find_server_flags(arguments: Sequence[str]) -> ServerFlags:
    """Those among the arguments of a command, others left alone."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    add_server_flags(parser)
    return server_flags(parser.parse_known_args(arguments)[0])


def as_arguments(flags: ServerFlags) -> Iterator[str]:
    """What has to be written to say the same; nothing for defaults."""
    graphs = flags.graphs
    if flags.dtype != "auto":
        yield from ("--dtype", flags.dtype)
    for name in ("page_size", "max_running_requests", "context_length"):
        if value := getattr(flags, name):
            yield from (flag_name(name), str(value))
    if graphs.backend:
        yield from ("--cuda-graph-backend-decode", graphs.backend)
    if graphs.sizes:
        yield from ("--cuda-graph-bs-decode", *map(str, graphs.sizes))
    if graphs.max_size:
        yield from ("--cuda-graph-max-bs-decode", str(graphs.max_size))
    if graphs.no_padding:
        yield "--disable-cuda-graph-padding"
    if flags.packed_experts != AUTO:
        yield from ("--packed-experts", flags.packed_experts)
