"""`python -m sglmoe.launch_server`: sglang's server, flag for flag, with sglmoe's scheduler and worker in it.

One of the files that know sglang, but nothing here may import it before the fork server has been started.
"""

import argparse
import os
import sys
from collections.abc import Callable
from socket import SO_REUSEADDR, SOCK_STREAM, SOL_SOCKET, getaddrinfo, socket, socketpair
from typing import Any, NoReturn, ParamSpec, TypeVar

from sglmoe.config import (
    PREDICTORS,
    EngineConfig,
    Options,
    parse_expert_affinity,
    parse_expert_predictor,
    parse_expert_prefetch,
    parse_fill_passes,
    parse_memory_planner,
    parse_memory_policy,
    parse_packed_experts,
    parse_packed_share,
    parse_shutdown_timeout,
    parse_target,
    parse_ttft_target,
)
from sglmoe.demo_model import DEMO_MODEL
from sglmoe.errors.options import cannot_listen, did_not_start, not_a_size, usage
from sglmoe.start_up import keep_start_method, leave_after, start_importing
from sglmoe.units import parse_bytes

P = ParamSpec("P")
T = TypeVar("T")

PROGRAM = "python -m sglmoe.launch_server"


def main() -> NoReturn:
    """Serve until told to stop; the process ends here."""
    leave_after(run, sys.argv[1:])


def run(argv: list[str]) -> None:
    options = or_leave(read_options, argv)
    start_importing()
    from sglang.srt.utils import kill_process_tree

    try:
        server_args, config = or_leave(read_command_line, argv, options)
        serve(server_args, config, parse_shutdown_timeout(options.shutdown_timeout))
    finally:
        kill_process_tree(os.getpid(), include_parent=False)


def or_leave(function: Callable[P, T], *args: P.args, **keywords: P.kwargs) -> T:
    """Call a function whose ValueErrors are messages to the operator, not bugs."""
    try:
        return function(*args, **keywords)
    except ValueError as error:
        sys.exit(f"{PROGRAM}: {error}")


def read_command_line(argv: list[str], options: Options) -> tuple[Any, EngineConfig]:
    """sglang's ServerArgs and ours, checked. Raises ValueError, saying what to change."""
    server_args = read_server_args(argv)
    from sglmoe.preparation import prepare

    config = prepare(server_args, options)
    check_address(server_args.host, server_args.port)
    print(plan_of(server_args, config), file=sys.stderr)
    return server_args, config


def check_address(host: str, port: int) -> None:
    """Raises ValueError if the server will not be able to listen there: sglang finds that out when the model is loaded."""
    try:
        family, *_, address = getaddrinfo(host, port, type=SOCK_STREAM)[0]
        with socket(family) as listener:
            listener.setsockopt(SOL_SOCKET, SO_REUSEADDR, 1)  # as the server itself does
            listener.bind(address)
    except OSError as error:
        raise cannot_listen(host=host, port=port, why=error.strerror or str(error)) from None


def plan_of(server_args: Any, config: EngineConfig) -> str:
    """What to expect of these flags on this machine, in a few lines; `python -m sglmoe.plan` says more."""
    from sglmoe.plan.at_start import start_report
    from sglmoe.plan.server_flags import ServerFlags
    from sglmoe.preparation import read_graph_flags

    flags = ServerFlags(
        dtype=server_args.dtype,
        page_size=config.page_tokens,
        max_running_requests=server_args.max_running_requests,
        context_length=server_args.context_length,
        graphs=read_graph_flags(server_args),
        packed_experts=config.packed_experts,
    )
    return start_report(
        config,
        model_path=server_args.model_path,
        flags=flags,
        device=server_args.device,
        gpu_id=server_args.base_gpu_id,
    )


def serve(server_args: Any, config: EngineConfig, shutdown_seconds: float) -> None:
    """Run the server until it is told to stop, and then for at most `shutdown_seconds` until all requests have ended."""
    from sglang.srt.entrypoints.http_server import launch_server

    from sglmoe.graceful_stop import with_limit
    from sglmoe.live_view.routes import add_routes
    from sglmoe.preparation import detokenizer_entry, scheduler_entry

    keep_start_method()
    ours, viewers = socketpair()
    add_routes(ours)
    try:
        launch_server(
            server_args,
            init_tokenizer_manager_func=with_limit(shutdown_seconds),
            run_scheduler_process_func=scheduler_entry(config, viewers),
            run_detokenizer_process_func=detokenizer_entry(),
        )
    except RuntimeError as error:
        # sglang's words for a scheduler that has logged its reasons and left.
        if "died during initialization" not in str(error):
            raise
        sys.exit(f"{PROGRAM}: {did_not_start()}")


# ---------------------------------------------------------------------------------------------------- command line


class Parser(argparse.ArgumentParser):
    """Says what is wrong and nothing else: sglang's usage alone fills three screens."""

    def error(self, message: str) -> NoReturn:
        raise usage(why=message)


def our_parser() -> Parser:
    parser = Parser(
        prog=PROGRAM,
        usage=f"{PROGRAM} [--memory-budget SIZE] [any of sglang's options]",
        add_help=False,
        allow_abbrev=False,
    )
    group = parser.add_argument_group("sglmoe")
    group.add_argument(
        "--memory-budget",
        metavar="SIZE",
        help="Device memory for everything: dense weights, KV cache and experts. Bytes (24GiB, 800MB) or a share of "
        "the device (80%%). Default: 85%% of a GPU's free memory; on a CPU, half of what the cgroup allows.",
    )
    group.add_argument(
        "--host-memory",
        metavar="SIZE",
        help="Host memory for experts that are in no frame of the budget, beside it, likewise; what it does not hold is "
        "read from the checkpoint. Default: 70%% beside a GPU; on a CPU none, there the page cache does that.",
    )
    group.add_argument(
        "--memory-policy",
        metavar="POLICY",
        help="Who gives way when memory is full: cost-aware (default) compares experts and cached prefixes by the seconds "
        "that a byte of each saves; lru, lfu and static=SHARE (experts get that share of what the dense weights leave, "
        "and no more) are there to compare with.",
    )
    group.add_argument(
        "--memory-planner",
        metavar="on|off",
        help="Whether new requests wait while the KV of more would leave experts so few frames that fewer tokens a second "
        "came out. Default: on.",
    )
    group.add_argument(
        "--expert-prefetch",
        metavar="off|observe|on",
        help="Whether experts are brought in before their layer asks for them: observe predicts and keeps score, on acts on "
        "it as long as decode steps take less time with it than without, which is tried now and then. Default: off.",
    )
    group.add_argument(
        "--expert-predictor",
        metavar="NAME",
        help=f"Who predicts which experts: {', '.join(PREDICTORS[1:])}, the path of a trained one "
        "(python -m sglmoe.prediction.train), or auto (default): the one whose predictions would have been the most use.",
    )
    add_pass_flags(group)
    group.add_argument(
        "--shutdown-timeout",
        metavar="SECONDS",
        help="How long requests may go on after SIGTERM; those that have not finished by then are answered with what they "
        "have, as aborted. Default: 60.",
    )
    add_packed_flags(group)
    return parser


def add_pass_flags(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--fill-passes",
        metavar="on|off",
        help="Whether, while passes over prompts have to load experts, prompts wait for others to share a pass with, and "
        "longer pieces of them are computed at once (up to --max-prefill-tokens). Not with "
        "--enable-deterministic-inference. Default: off.",
    )
    group.add_argument(
        "--expert-affinity",
        metavar="on|off",
        help="Whether, while experts have to be loaded, the next request is the one of the first 16 that wait whose prompt "
        "shares the most tokens with those that run, as these take similar experts; nobody is overtaken more than 16 times. "
        "With --schedule-policy fcfs. Default: off.",
    )
    group.add_argument(
        "--ttft-target",
        metavar="SECONDS",
        help="With --fill-passes on: collect no more prompts than lets a first token come so soon after its request. "
        "Default: no target, prompts wait for at most four times as long as the experts of a pass take to come.",
    )
    group.add_argument(
        "--itl-target",
        metavar="SECONDS",
        help="Run no more requests at once, and compute no longer pieces of prompts beside them, than lets one token follow "
        "another so soon. Default: no target, the most tokens a second.",
    )


def add_packed_flags(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--packed-experts",
        metavar="off|on|auto|FOLDER",
        help="Whether experts are read in the smaller form that python -m sglmoe.pack wrote beside the checkpoint, or into "
        "FOLDER: auto (default) where there are any that match, on refuses to start without. The same bits either way.",
    )
    group.add_argument(
        "--packed-share",
        metavar="off|auto|SHARE",
        help="How much of the memory that KV cache leaves should hold packed experts, 1.4 times as many as it would "
        "ready ones, each to be decoded when it is used: auto plans that by what loads and decoding take, here and now, which "
        "may be nothing; 30%% holds so much in any case. Needs packed experts; no GPU has run it. Default: off.",
    )


def read_options(argv: list[str]) -> Options:
    """Our own flags. Raises ValueError for what no machine could mean."""
    given, _ = our_parser().parse_known_args(argv)
    for flag, text in (
        ("--memory-budget", given.memory_budget),
        ("--host-memory", given.host_memory),
    ):
        try:
            parse_bytes(text or "100%", whole_bytes=1)
        except ValueError as error:
            raise not_a_size(flag=flag, why=str(error)) from None
    parse_memory_policy(given.memory_policy)
    parse_memory_planner(given.memory_planner)
    parse_expert_prefetch(given.expert_prefetch)
    parse_expert_predictor(given.expert_predictor)
    parse_fill_passes(given.fill_passes)
    parse_expert_affinity(given.expert_affinity)
    parse_ttft_target(given.ttft_target, given.fill_passes)
    parse_target("--itl-target", given.itl_target)
    parse_shutdown_timeout(given.shutdown_timeout)
    parse_packed_experts(given.packed_experts)
    parse_packed_share(given.packed_share)
    return Options(
        memory_budget=given.memory_budget,
        host_memory=given.host_memory,
        memory_policy=given.memory_policy,
        memory_planner=given.memory_planner,
        expert_prefetch=given.expert_prefetch,
        expert_predictor=given.expert_predictor,
        fill_passes=given.fill_passes,
        expert_affinity=given.expert_affinity,
        ttft_target=given.ttft_target,
        itl_target=given.itl_target,
        shutdown_timeout=given.shutdown_timeout,
        packed_experts=given.packed_experts,
        packed_share=given.packed_share,
    )


def read_server_args(argv: list[str]) -> Any:
    """sglang's flags as the operator gave them, with the demo model where no other is named."""
    from sglang.srt.plugins import load_plugins

    load_plugins()
    from sglang.srt.server_args import ServerArgs, prepare_server_args

    parser = Parser(prog=PROGRAM, usage=argparse.SUPPRESS)
    ServerArgs.add_cli_args(parser)
    _, argv = our_parser().parse_known_args(argv)
    if {"-h", "--help"} & set(argv):
        our_parser().print_help()
        parser.print_help()
        sys.exit()
    argv = merge_config_file(argv, parser)
    if not names_model(argv, parser):
        print(f"No --model-path: serving the demo model in {DEMO_MODEL}", file=sys.stderr)
        argv = ["--model-path", str(DEMO_MODEL), *argv]
    return prepare_server_args(argv)


def merge_config_file(argv: list[str], parser: Parser) -> list[str]:
    if "--config" not in argv:
        return argv
    from sglang.srt.utils.server_args_config_parser import ConfigArgumentMerger

    merged: list[str] = ConfigArgumentMerger(parser).merge_config_with_args(argv)
    return merged


def names_model(argv: list[str], parser: Parser) -> bool:
    """Whether a model is named. Raises ValueError for flags that sglang does not know."""
    for action in parser._actions:
        if action.dest == "model_path":
            action.required = False
    return parser.parse_args(argv).model_path is not None


if __name__ == "__main__":
    main()
