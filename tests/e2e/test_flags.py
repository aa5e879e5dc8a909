"""Every flag of the installed sglang has been thought about, and what can't work is refused at start-up."""

import socket
import sys
from pathlib import Path
from types import SimpleNamespace

import msgspec
import pytest
from checkpoints import make_checkpoint
from forking import run_in_fork
from serving import free_port, run_as_a_user

from sglmoe import flags
from sglmoe.config import EngineConfig


@pytest.mark.usefixtures("preloaded")
def test_every_flag_of_sglang_is_in_a_table() -> None:
    """An upgrade that brings a flag has to say what becomes of it."""
    from sglmoe.preparation import flag_namespaces

    assert flags.unclassified(flag_namespaces()) == []


@pytest.mark.usefixtures("preloaded")
def test_every_table_names_flags_that_exist() -> None:
    from sglmoe.preparation import flag_namespaces

    existing = flag_namespaces()
    named = flags.HONOURED | set(flags.VALUES) | set(flags.REASONS)
    assert named - existing.keys() == set()
    assert set(flags.NAMESPACE_REASONS) <= set(existing.values())


@pytest.mark.usefixtures("preloaded")
def test_no_flag_is_classified_twice() -> None:
    parts = [flags.FRONT_END, flags.MODEL, flags.OURS, flags.ALREADY_SO, frozenset(flags.VALUES)]
    assert len(frozenset().union(*parts)) == sum(map(len, parts))
    assert flags.HONOURED.isdisjoint(flags.REASONS)


def refusal(*flags_given: str) -> str:
    """What the launcher says to these flags; it must say it, and leave, before any process serves."""
    return run_in_fork(_refusal, flags_given)


def _refusal(flags_given: tuple[str, ...]) -> str:
    from sglmoe.launch_server import read_command_line, read_options

    try:
        argv = list(flags_given)
        read_command_line(argv, read_options(argv))
    except ValueError as error:
        return str(error)
    return ""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory, preloaded: None) -> Path:
    return run_in_fork(make_checkpoint, "qwen3_moe", tmp_path_factory.mktemp("flags"))


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ("--tp 2", "--tp-size=2: "),
        ("--pp-size 2", "--pp-size=2: "),
        ("--dp-size 2", "--dp-size=2: "),
        ("--ep-size 2", "--ep-size=2: "),
        ("--nnodes 2", "--nnodes=2: "),
        ("--speculative-algorithm NGRAM", "speculative decoding does not work yet"),
        ("--enable-lora", "merge them into the checkpoint"),
        ("--disaggregation-mode prefill", "disaggregated prefill"),
        ("--enable-hierarchical-cache", "caching KV beyond the device"),
        ("--enable-paged-experts", "use --memory-budget"),
        ("--cpu-offload-gb 4", "use --memory-budget"),
        ("--mem-fraction-static 0.8", "use --memory-budget"),
        ("--enable-multimodal", "only text"),
        ("--is-embedding", "use unmodified SGLang for embeddings"),
        ("--quantization fp8", "weights are served as the checkpoint has them"),
        ("--page-size 0", "at least one token"),
        ("--memory-budget 900TiB", "--memory-budget: 900TiB is more than"),
        ("--expert-prefetch maybe", "--expert-prefetch: 'maybe' is none of off, observe, on"),
        ("--expert-predictor astrologer", "--expert-predictor: 'astrologer' is none of auto, "),
        ("--ttft-target 1", "--ttft-target bounds how long prompts wait"),
        ("--itl-target 1 --chunked-prefill-size -1", "prompts are computed in one piece"),
        ("--packed-experts maybe", "--packed-experts: 'maybe' is none of off, on, auto"),
        ("--packed-share half", "--packed-share: 'half' is none of off, auto and a share"),
        ("--cuda-graph-backend-decode full", "there is no CUDA device to capture on"),
        ("--cuda-graph-backend-decode breakable", "there is no CUDA device to capture on"),
        ("--cuda-graph-backend-prefill breakable", "decode steps alone can be captured"),
        ("--cuda-graph-max-bs-decode 8", "add --cuda-graph-backend-decode=breakable"),
        ("--no-such-flag", "unrecognized arguments: --no-such-flag"),
    ],
)
def test_what_can_not_work_is_refused_in_one_message(model: Path, given: str, words: str) -> None:
    assert words in refusal("--model-path", str(model), *given.split())


def test_tied_embeddings_are_refused(model: Path) -> None:
    override = '{"tie_word_embeddings": true}'
    message = refusal("--model-path", str(model), "--json-model-override-args", override)
    assert "tie_word_embeddings" in message


def test_honoured_flags_are_served(model: Path) -> None:
    given = f"--schedule-policy lpm --page-size 4 --memory-budget 50% --enable-metrics --port {free_port()}"
    assert refusal("--model-path", str(model), *given.split()) == ""


def test_a_port_that_is_taken_is_refused(model: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        message = refusal("--model-path", str(model), f"--port={port}")
    assert f"port {port} of 127.0.0.1 can not be listened to" in message


@pytest.mark.slow
def test_the_launcher_leaves_with_one_message_and_no_traceback(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "sglmoe.launch_server", "--model-path", str(tmp_path / "none")]
    outcome = run_as_a_user(*command, log=tmp_path / "log")
    assert outcome.exitcode == 1
    assert outcome.log.rstrip().endswith("none is not a folder with a checkpoint")
    assert "Traceback" not in outcome.log


@pytest.mark.usefixtures("preloaded")
def test_answers_that_have_to_be_the_same_bits_are_not_cut_by_measured_times() -> None:
    """Not by the launcher: on a CPU SGLang refuses deterministic inference before we can."""
    from sglmoe.preparation import check_prompts_can_be_cut

    flags = SimpleNamespace(chunked_prefill_size=512, enable_deterministic_inference=True)
    with pytest.raises(ValueError, match="not with --enable-deterministic-inference"):
        check_prompts_can_be_cut(flags)
    flags.enable_deterministic_inference = False
    check_prompts_can_be_cut(flags)


@pytest.mark.usefixtures("preloaded")
@pytest.mark.parametrize(
    ("given", "max_rows"),
    [
        ({}, 32),
        ({"max_running_requests": 5}, 5),
        ({"disable_cuda_graph_padding": True}, 32),
        ({"cuda_graph_bs_decode": [1, 3]}, None),
    ],
)
def test_small_steps_are_captured_unless_a_flag_says_which(
    given: dict[str, object], max_rows: int | None
) -> None:
    """On a GPU, where there is one."""
    from sglmoe.preparation import settle_graphs

    none = ("cuda_graph_bs_decode", "cuda_graph_max_bs_decode", "max_running_requests")
    its = dict.fromkeys(none) | {"disable_cuda_graph_padding": False}
    its |= {"device": "cuda", "cuda_graph_backend_decode": "breakable"} | given
    flags = SimpleNamespace(**its)
    settle_graphs(flags)
    assert flags.cuda_graph_max_bs_decode == max_rows


@pytest.mark.usefixtures("preloaded")
def test_steps_without_the_host_can_not_decode_what_frames_hold_packed() -> None:
    """On a GPU; a share of the frames that is planned would be found out long after the start."""
    from sglmoe.preparation import check_steps_need_no_host

    config = EngineConfig(memory_budget_bytes=1, host_memory_bytes=1)
    check_steps_need_no_host(config)
    for share in (None, 0.3):
        packed = msgspec.structs.replace(config, packed_share=share)
        with pytest.raises(
            ValueError, match="--packed-share: full graphs bring experts in from host"
        ):
            check_steps_need_no_host(packed)
