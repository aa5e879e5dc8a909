"""`python -m sglmoe.top`: what a running server does, in a terminal. The same as its page `/sglmoe`."""

import argparse
import sys
import time
import urllib.error
import urllib.request
from collections import deque
from collections.abc import Callable

import msgspec
from rich.console import Console, Group
from rich.live import Live
from rich.text import Text

from sglmoe.live_view.picture import picture
from sglmoe.live_view.state import LiveState

PROGRAM = "python -m sglmoe.top"
# Arbitrary: an answer takes a few milliseconds.
ANSWER_SECONDS = 5.0
# Between the two questions that rates take.
ONCE_SECONDS = 1.0
MAX_HISTORY = 500

Ask = Callable[[], LiveState]


class NoAnswer(Exception):
    """There is no state to be had; the message says why and what to change."""


def main() -> None:
    options = parser().parse_args()
    console = Console()
    try:
        ask = asking(options.url, options.api_key)
        show_once(ask, console) if options.once else show_on(ask, console, options.interval)
    except NoAnswer as none:
        sys.exit(f"{PROGRAM}: {none}")
    except KeyboardInterrupt:
        pass


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog=PROGRAM, description="Watch a running sglmoe server.")
    parser.add_argument("--url", default="http://127.0.0.1:30000", help="Default: %(default)s.")
    parser.add_argument("--api-key", help="The server's --api-key, if it has one.")
    parser.add_argument(
        "--interval", type=float, default=0.5, metavar="SECONDS", help="Default: %(default)s."
    )
    parser.add_argument("--once", action="store_true", help="Print one picture and end.")
    return parser


def asking(url: str, api_key: str | None) -> Ask:
    """What asks the server. Raises NoAnswer, as that does, where `url` is none."""
    headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
    if not url.startswith(("http://", "https://")):
        raise NoAnswer(f"--url {url}: not a URL; write for example http://127.0.0.1:30000")
    request = urllib.request.Request(f"{url.rstrip('/')}/sglmoe/state", headers=headers)

    def ask() -> LiveState:
        try:
            with urllib.request.urlopen(request, timeout=ANSWER_SECONDS) as response:
                return msgspec.json.decode(response.read(), type=LiveState)
        except urllib.error.HTTPError as error:
            raise NoAnswer(f"{url}: {reason_of(error)}") from None
        except (OSError, urllib.error.URLError) as error:
            why = getattr(error, "reason", error)
            raise NoAnswer(
                f"no server answers at {url} ({why}); it may still be starting, or --url is another"
            ) from None
        except msgspec.MsgspecError as error:
            raise NoAnswer(
                f"{url} speaks another version of sglmoe than this command: {error}"
            ) from None

    return ask


def reason_of(error: urllib.error.HTTPError) -> str:
    match error.code:
        case 401:
            return "the server wants its key: --api-key KEY"
        case 404:
            return "the server has no live view; is it sglmoe's?"
        case _:
            return f"{error.code}, {error.read(200).decode(errors='replace')}"


def show_once(ask: Ask, console: Console) -> None:
    ask()
    time.sleep(ONCE_SECONDS)
    state = ask()
    console.print(picture(state, width=console.width))


def show_on(ask: Ask, console: Console, interval: float) -> None:
    """Until Ctrl-C. A server that goes away is waited for; one that was never there is not."""
    state, lost = ask(), ""
    kv_shares: deque[float] = deque(maxlen=MAX_HISTORY)
    with Live(console=console, screen=console.is_terminal, auto_refresh=False) as live:
        while True:
            kv_shares.append(kv_share(state))
            shown = picture(state, width=console.width, kv_shares=list(kv_shares))
            live.update(Group(Text(lost, style="red"), shown) if lost else shown, refresh=True)
            time.sleep(interval)
            state, lost = ask_again(ask, state)


def ask_again(ask: Ask, before: LiveState) -> tuple[LiveState, str]:
    """The state, or the one before and a word on why."""
    try:
        return ask(), ""
    except NoAnswer as none:
        return before, f"connection lost, trying again: {none}"


def kv_share(state: LiveState) -> float:
    return state.memory.kv_frames / max(1, state.memory.num_frames)


if __name__ == "__main__":
    main()
