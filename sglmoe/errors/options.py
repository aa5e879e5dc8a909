"""Flags that can't be meant, or don't go together, or ask for more than the machine has."""

from collections.abc import Sequence
from pathlib import Path

from sglmoe.errors.user_error import UserError
from sglmoe.units import show_bytes


def not_a_choice(*, flag: str, given: str, choices: Sequence[str]) -> UserError:
    return UserError(f"{flag}: {given!r} is none of {', '.join(choices)}")


def not_a_share(*, flag: str, given: str) -> UserError:
    return UserError(f"{flag}: {given!r} is not a share such as 60%")


def not_a_size(*, flag: str, why: str) -> UserError:
    """`why`: in the words of `units.parse_bytes`."""
    return UserError(f"{flag}: {why}")


def not_seconds(*, flag: str, given: str) -> UserError:
    return UserError(f"{flag}: {given!r} is not a number of seconds")


def not_seconds_above_0(*, flag: str, given: str) -> UserError:
    return UserError(f"{flag}: {given!r} is not a number of seconds above 0")


def unknown_predictor(*, given: str, known: Sequence[str]) -> UserError:
    return UserError(
        f"--expert-predictor: {given!r} is none of {', '.join(known)}, and not a trained one's .json"
    )


def unknown_packed_experts(*, given: str) -> UserError:
    return UserError(
        f"--packed-experts: {given!r} is none of off, on, auto, and no folder; write ./{given} for one"
    )


def unknown_packed_share(*, given: str) -> UserError:
    return UserError(f"--packed-share: {given!r} is none of off, auto and a share such as 30%")


def packed_share_without_values(*, given: str, policy: str) -> UserError:
    return UserError(
        f"--packed-share={given}: with --memory-policy={policy} nothing says what packed experts are worth; leave out either"
    )


def nothing_packed(*, given: str, why: str) -> UserError:
    return UserError(
        f"--packed-share={given}: {why}; pack them with python -m sglmoe.pack, or leave it out"
    )


def ttft_target_without_filling() -> UserError:
    return UserError(
        "--ttft-target bounds how long prompts wait for others, which they do with --fill-passes=on: "
        "add that, or leave it out"
    )


def itl_target_with_whole_prompts() -> UserError:
    return UserError(
        "--itl-target: with --chunked-prefill-size=-1 prompts are computed in one piece, however long those who decode "
        "wait for them; leave out either"
    )


def itl_target_with_determinism() -> UserError:
    return UserError(
        "--itl-target cuts prompts by measured times, which moves last bits of answers: not with "
        "--enable-deterministic-inference; leave out either"
    )


def page_without_tokens(*, num_tokens: int) -> UserError:
    return UserError(f"--page-size={num_tokens}: a KV page holds at least one token")


def more_than_there_is(*, flag: str, given: str, whole_bytes: int) -> UserError:
    return UserError(
        f"{flag}: {given} is more than the {show_bytes(whole_bytes)} there are; ask for less"
    )


def together_more_than_there_is(
    *, budget_bytes: int, host_bytes: int, whole_bytes: int, is_default_budget: bool = False
) -> UserError:
    by_default = " (the default)" if is_default_budget else ""
    return UserError(
        f"--memory-budget of {show_bytes(budget_bytes)}{by_default} and --host-memory of "
        f"{show_bytes(host_bytes)} together are more than the {show_bytes(whole_bytes)} "
        "there are; ask for less of either"
    )


def accelerator_beside_cpu() -> UserError:
    return UserError("--device=cpu: there is an accelerator; set CUDA_VISIBLE_DEVICES= as well")


def no_cuda_device(*, device: str) -> UserError:
    return UserError(f"--device={device}: torch finds no CUDA device; use --device=cpu without one")


def graphs_on_a_cpu(*, backend: str) -> UserError:
    return UserError(
        f"--cuda-graph-backend-decode={backend}: there is no CUDA device to capture on; leave it out"
    )


def graph_sizes_without_graphs(*, flag: str) -> UserError:
    return UserError(
        f"{flag} is about decode steps that are captured: add --cuda-graph-backend-decode=breakable, or leave it out"
    )


def full_graphs_beside_packed_share() -> UserError:
    return UserError(
        "--packed-share: full graphs bring experts in from host memory, not from other frames; leave it out, or use "
        "--cuda-graph-backend-decode=breakable"
    )


def usage(*, why: str) -> UserError:
    """`why`: argparse's words, with the argument's name."""
    return UserError(f"{why} (see --help)")


def refused_flags(*, reasons: Sequence[str]) -> UserError:
    """Each of `reasons` has a flag's name and value, why, and what to do: `flags.py` has them in tables."""
    return UserError("\n  ".join(reasons))


def cannot_listen(*, host: str, port: int, why: str) -> UserError:
    return UserError(
        f"port {port} of {host} can not be listened to: {why}; choose another one with --port (or --host), or end the "
        "server that has it"
    )


def did_not_start() -> UserError:
    return UserError("the server did not start; the reason is in the log above")


# ------------------------------------------------------------------------------------- python -m sglmoe.plan, recipes


def half_a_machine() -> UserError:
    return UserError(
        "--host-memory describes another machine; say --gpu-memory as well, or --device cpu"
    )


def no_matplotlib() -> UserError:
    return UserError("--plot needs matplotlib: pip install 'sglmoe[eval]'")


def unknown_machine(*, given: str, known: Sequence[str]) -> UserError:
    return UserError(
        f"machine = {given!r} is none of {', '.join(known)}: name one of machines.toml, or add it"
    )


def recipe_not_started() -> UserError:
    return UserError("not started; see above. --dry-run checks without starting")


def bad_recipe(*, path: Path, why: str) -> UserError:
    return UserError(f"recipe {path}: {why}")


def no_epochs(*, num_epochs: int) -> UserError:
    return UserError(f"--epochs {num_epochs}: at least 1")
