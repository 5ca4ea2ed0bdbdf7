"""The HTTP limits: hypercorn on Trio, with a Quart-Trio view or with a raw ASGI function.

python -m limits.web quart|raw PORT
"""

from __future__ import annotations

import sys
from typing import Any

import hypercorn
import hypercorn.trio
import trio
from hypercorn.typing import ASGIReceiveCallable, ASGISendCallable, Scope
from quart import request
from quart_trio import QuartTrio

quart = QuartTrio(__name__)


@quart.post("/job")
async def view() -> tuple[dict[str, Any], int]:
    """Read JSON, answer JSON: the least that a job in one request can cost in this framework."""
    job = await request.get_json()
    return {"id": job["job_type"]}, 202


async def raw(scope: Scope, receive: ASGIReceiveCallable, send: ASGISendCallable) -> None:
    """Read a body, answer bytes: the least that a request can cost on this server."""
    if scope["type"] != "http":
        raise NotImplementedError  # there is no lifespan and no web socket: hypercorn goes on without
    while (message := await receive())["type"] == "http.request" and message["more_body"]:
        pass
    body = b'{"id": "math"}\n'
    headers = [(b"content-type", b"application/json"), (b"content-length", b"%d" % len(body))]
    await send({"type": "http.response.start", "status": 202, "headers": headers, "trailers": False})
    await send({"type": "http.response.body", "body": body, "more_body": False})


def main() -> None:
    name, port = sys.argv[1:]
    config = hypercorn.Config()
    config.bind = [f"127.0.0.1:{port}"]
    config.accesslog = None
    config.include_server_header = False
    app: Any = {"quart": quart, "raw": raw}[name]
    trio.run(hypercorn.trio.serve, app, config)


if __name__ == "__main__":
    main()
