"""Would a command be taken? Asked of its own parser, in a fork, without running it."""

import argparse
import runpy
import sys
from collections.abc import Sequence
from typing import Any, NoReturn


class _Taken(Exception):
    """The arguments were parsed; nothing further is to happen."""


def refused(arguments: Sequence[str]) -> str:
    """Why the server would not take these arguments: our parser's words, SGLang's, or the flag tables'; "" if it would."""
    from sglang.srt.server_args import ServerArgs

    from sglmoe.flags import refused_flags
    from sglmoe.launch_server import Parser, our_parser, read_options
    from sglmoe.preparation import flag_defaults, flag_namespaces

    parser = Parser()
    ServerArgs.add_cli_args(parser)
    for action in parser._actions:
        if action.dest == "model_path":
            action.required = False
    try:
        read_options(list(arguments))
        given = vars(parser.parse_args(our_parser().parse_known_args(list(arguments))[1]))
    except ValueError as error:
        return str(error)
    names = flag_namespaces()
    values = {name: given[name] for name in names if name in given}
    return "; ".join(refused_flags(values, flag_defaults(), names))


def parsed(module: str, arguments: Sequence[str]) -> str:
    """Whether `python -m MODULE ARGUMENTS` gets beyond its arguments: "" if so. For modules that use argparse."""

    def take(self: argparse.ArgumentParser, args: Any = None, namespace: Any = None) -> NoReturn:
        given, unknown = self.parse_known_args(args, namespace)
        if unknown:
            self.error(f"unrecognized arguments: {' '.join(unknown)}")
        raise _Taken(given)

    argparse.ArgumentParser.parse_args = take  # type: ignore[method-assign,assignment]
    try:
        status = run_module(module, arguments)
    except _Taken:
        return ""
    return f"{module} ended with {status} before it parsed anything, or refused its arguments"


def run_module(module: str, arguments: Sequence[str]) -> int:
    """As `python -m`; its status."""
    sys.argv = [module, *arguments]
    try:
        runpy.run_module(module, run_name="__main__", alter_sys=True)
    except SystemExit as end:
        if isinstance(end.code, str):
            print(end.code)
        return end.code if isinstance(end.code, int) else int(end.code is not None)
    return 0
