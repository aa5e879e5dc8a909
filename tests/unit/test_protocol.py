"""Every message survives the wire, and what is not one is refused."""

from typing import Any, Literal, get_args

import msgspec
import pytest

from sglmoe import protocol
from sglmoe.protocol import FromWorker, Limits, MemorySnapshot, NewRequest, StepPlan, ToWorker

MESSAGES = [*get_args(ToWorker), *get_args(FromWorker)]


def example(annotation: Any) -> Any:
    """A value of a type, made up but never the default."""
    if isinstance(annotation, type) and issubclass(annotation, msgspec.Struct):
        hints = {field.name: field.type for field in msgspec.structs.fields(annotation)}
        return annotation(**{name: example(hint) for name, hint in hints.items()})
    match annotation.__origin__ if hasattr(annotation, "__origin__") else annotation:
        case t if t is tuple:
            arguments = [a for a in get_args(annotation) if a is not Ellipsis]
            return tuple(example(a) for a in arguments)
        case t if t is dict:
            return {example(k): example(v) for k, v in [get_args(annotation)]}
        case t if t is Literal:
            return get_args(annotation)[-1]
        case t if t in VALUES:
            return VALUES[t]
        case _:  # a union with None
            return example(next(a for a in get_args(annotation) if a is not type(None)))


VALUES: dict[Any, Any] = {int: 7, float: 0.25, str: "text", bytes: b"\1\0\0\0", bool: True}


@pytest.mark.parametrize("kind", MESSAGES, ids=lambda kind: kind.__name__)
def test_every_message_comes_out_as_it_went_in(kind: type[msgspec.Struct]) -> None:
    message = example(kind)
    union = ToWorker if kind in get_args(ToWorker) else FromWorker
    decoded = msgspec.msgpack.decode(msgspec.msgpack.encode(message), type=union)
    assert decoded == message
    assert type(decoded) is kind


def test_every_message_is_in_exactly_one_direction() -> None:
    declared = {
        value
        for value in vars(protocol).values()
        if isinstance(value, type) and issubclass(value, protocol.Message)
    }
    assert declared - {protocol.Message} == set(MESSAGES)
    assert len(MESSAGES) == len(set(MESSAGES))


@pytest.mark.parametrize(
    "wire",
    [
        ["NoSuchMessage", 1],
        ["StepPlan", "not a number"],
        ["StepPlan", 1, [], [], [], [], "a field of a later version"],
    ],
)
def test_what_is_no_message_is_refused(wire: list[object]) -> None:
    with pytest.raises(msgspec.ValidationError):
        msgspec.msgpack.decode(msgspec.msgpack.encode(wire), type=ToWorker)


def test_messages_can_not_be_changed() -> None:
    with pytest.raises(AttributeError):
        StepPlan(step_id=1).step_id = 2  # type: ignore[misc]


def test_available_pages_are_all_that_running_requests_do_not_hold() -> None:
    """Cached prefixes give way, so they count as available."""
    snapshot = msgspec.structs.replace(
        example(MemorySnapshot), total_pages=10, locked_pages=3, cached_pages=5
    )
    assert snapshot.available_pages == 7


def test_the_nested_structs_are_covered_by_the_round_trip() -> None:
    assert example(NewRequest).logprobs.token_ids == (7,)
    assert example(Limits).context_tokens == 7
