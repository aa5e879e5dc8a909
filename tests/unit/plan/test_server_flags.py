"""Flags of the server's that a plan takes, and hands on."""

from hypothesis import given
from hypothesis import strategies as st

from sglmoe.decode_graphs import GraphFlags
from sglmoe.plan.server_flags import ServerFlags, as_arguments, find_server_flags

SIZE = st.integers(1, 512)
GRAPHS = st.builds(
    GraphFlags,
    st.sampled_from([None, "disabled", "breakable"]),
    st.lists(SIZE, max_size=3).map(tuple),
    st.none() | SIZE,
    st.booleans(),
)
FLAGS = st.builds(
    ServerFlags,
    dtype=st.sampled_from(["auto", "half", "float32"]),
    page_size=st.none() | SIZE,
    max_running_requests=st.none() | SIZE,
    context_length=st.none() | SIZE,
    graphs=GRAPHS,
    packed_experts=st.sampled_from(["auto", "on", "off", "./there"]),
)


@given(FLAGS)
def test_what_is_handed_on_says_the_same(flags: ServerFlags) -> None:
    assert find_server_flags([*as_arguments(flags), "--port", "1"]) == flags


def test_defaults_are_not_written() -> None:
    assert list(as_arguments(ServerFlags())) == []
    flags = ServerFlags(dtype="half", page_size=4, graphs=GraphFlags("breakable", (1, 8)))
    words = "--dtype half --page-size 4 --cuda-graph-backend-decode breakable --cuda-graph-bs-decode 1 8"
    assert list(as_arguments(flags)) == words.split()


def test_flags_are_found_among_others_and_not_guessed_at() -> None:
    """`--page` is none of them, and argparse would complete it."""
    words = "--enable-metrics --max-running-requests=7 --page 9 --cuda-graph-max-bs-decode 3"
    assert find_server_flags(words.split()) == ServerFlags(
        max_running_requests=7, graphs=GraphFlags(max_size=3)
    )
