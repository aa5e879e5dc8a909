"""`/sglmoe` and `/sglmoe/state` on SGLang's HTTP server.

One of the files that know SGLang: its application, to which routes are added, and its access log.
"""

import logging
import time
from importlib.resources import files
from socket import socket

from fastapi import Response
from sglang.srt.entrypoints import http_server
from sglang.srt.utils.common import UvicornAccessLogFilter

from sglmoe.live_view.feed import Feed, Line

PAGE = "/sglmoe"
STATE = "/sglmoe/state"
# Nothing but what is in the page itself, and its server: the browser sees to that.
POLICY = "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; img-src data:; connect-src 'self'"
FRESH = {"Cache-Control": "no-store"}


def add_routes(scheduler: socket) -> None:
    """To be called once, before the server runs. `scheduler` is the line to it; SGLang sees to --api-key, as everywhere."""
    html = files("sglmoe.live_view").joinpath("page.html").read_text()
    feed = Feed(Line(scheduler).ask, clock=time.monotonic)

    async def page() -> Response:
        headers = FRESH | {"Content-Security-Policy": POLICY}
        return Response(html, media_type="text/html", headers=headers)

    async def state() -> Response:
        try:
            return Response(await feed.latest(), media_type="application/json", headers=FRESH)
        except OSError:  # TimeoutError is one
            return Response("the scheduler does not answer", status_code=503, headers=FRESH)

    http_server.app.add_api_route(PAGE, page, methods=["GET"])
    http_server.app.add_api_route(STATE, state, methods=["GET"])
    # Asked several times a second: not a line of the access log each.
    logging.getLogger("uvicorn.access").addFilter(UvicornAccessLogFilter([STATE]))
