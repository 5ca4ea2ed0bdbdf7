"""The limit of one process for one job in each request: a bare Quart-Trio view, on hypercorn's own `serve`.

python bare.py PORT
"""

from __future__ import annotations

import sys
from typing import Any

import hypercorn
import hypercorn.trio
import trio
from quart import request
from quart_trio import QuartTrio

app = QuartTrio(__name__)


@app.post("/job")
async def view() -> tuple[dict[str, Any], int]:
    """Read JSON, answer JSON."""
    job = await request.get_json()
    return {"id": job["job_type"]}, 202


if __name__ == "__main__":
    config = hypercorn.Config()
    config.bind = [f"127.0.0.1:{sys.argv[1]}"]
    config.include_server_header = False
    trio.run(hypercorn.trio.serve, app, config)
