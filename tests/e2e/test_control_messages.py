"""Every message SGLang may send to a scheduler has an answer here. Imports SGLang, starts nothing.

Turns red when an SGLang upgrade brings a message that we do not know, whose endpoint would hang.
"""

import ast
import inspect
import textwrap
from types import SimpleNamespace
from typing import Any

from sglang.srt.managers import io_struct
from sglang.srt.managers.scheduler import Scheduler
from sglang.srt.managers.tokenizer_control_mixin import _COMMUNICATOR_SPECS

from sglmoe.scheduler.frontend import Frontend
from sglmoe.scheduler.frontend_control import REFUSALS, Control

# Taken by the front end itself, before control messages.
REQUESTS = {
    "TokenizedGenerateReqInput",
    "BatchTokenizedGenerateReqInput",
    "TokenizedEmbeddingReqInput",
    "BatchTokenizedEmbeddingReqInput",
    "ShutdownReq",
}
# Answered by methods of `Control`.
ANSWERED = {
    "FlushCacheReqOutput",
    "GetInternalStateReqOutput",
    "SetInternalStateReqOutput",
    "UpdateWeightVersionReqOutput",
    "ProfileReqOutput",
    "ExpertDistributionReqOutput",
}


def dispatched_by_sglang() -> set[str]:
    """The types in the table of SGLang's own scheduler."""
    source = textwrap.dedent(inspect.getsource(Scheduler.init_request_dispatcher))
    pairs = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Tuple)]
    return {pair.elts[0].id for pair in pairs if isinstance(pair.elts[0], ast.Name)}


def handlers() -> dict[type[Any], Any]:
    control = Control(scheduler=None, metrics=None, ready=None, to_detokenizer=None)  # type: ignore[arg-type]
    return control.handlers


def test_every_dispatched_type_has_a_handler() -> None:
    dispatched = dispatched_by_sglang()
    assert len(dispatched) > 40, "SGLang's table moved; look for it"
    assert dispatched - REQUESTS - {kind.__name__ for kind in handlers()} == set()


def test_the_front_end_takes_all_requests_itself() -> None:
    source = inspect.getsource(Frontend)
    assert [name for name in REQUESTS if f"io.{name}" not in source] == []


def test_every_communicator_gets_its_kind_of_answer() -> None:
    refusals = {type(refuse_blank(kind)).__name__ for kind in REFUSALS}
    expected = {spec[1].__name__ for spec in _COMMUNICATOR_SPECS}
    assert expected - refusals - ANSWERED == set()


def test_every_refusal_can_be_sent() -> None:
    for kind in REFUSALS:
        reply = refuse_blank(kind)
        if reply is not None:
            assert io_struct.msgpack_decode(io_struct.msgpack_encode(reply)) == reply


def test_refusals_say_no() -> None:
    replies = [refuse_blank(kind) for kind in REFUSALS]
    claimed = [reply for reply in replies if hasattr(reply, "success") and reply.success]
    assert claimed == []


def refuse_blank(kind: type[Any]) -> Any:
    """What a message of this type, with nothing in it, is told."""
    return REFUSALS[kind](SimpleNamespace(**dict.fromkeys(kind.__struct_fields__)))
