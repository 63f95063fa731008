"""A server on loopback that speaks as much of the protocol as the pages need. The prompt picks the answer."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

PAGES = Path(__file__).parents[3] / "hybrid" / "server" / "page"
API_KEY = "right"

MARKDOWN = """# Foxes

A **fox** is *small*, see [the list](https://example.org/a_(b)?c=1&d=2) and `a < b && c`.

1. One
2. Two
   - nested **deep**
   - other

> Quoted
> text

```python
def fox(n: int) -> str:
    return "<b>" * n  # & so on
```

| name | legs |
|------|-----:|
| fox | 4 |
| bird | 2 |

The end: snake_case_name, 2 * 3 * 4, https://example.org/x."""

HOSTILE = """<script>window.hacked = 1</script><img src=x onerror="window.hacked = 2">

[click](javascript:window.hacked=3) [data](data:text/html,<script>1</script>) ![i](https://example.org/x.png)

<svg onload="window.hacked = 4"></svg> **<b onclick=1>bold</b>** `<i>code</i>`

```html"><script>window.hacked = 5</script>
</code></pre><script>window.hacked = 6</script>
```

| <u>a</u> | b |
|---|---|
| <script>window.hacked = 7</script> | </td></table> |

# <iframe srcdoc="<script>parent.hacked = 8</script>">
"""

METRICS = """# HELP hybrid:num_requests_running Requests that are computed.
hybrid:num_requests_running 3.0
hybrid:num_requests_waiting 1.0
hybrid:kv_cache_usage_perc 0.25
hybrid:prefix_cache_queries_total {queries}
hybrid:prefix_cache_hits_total {hits}
hybrid:generation_tokens_total {written}
hybrid:prompt_tokens_total 5000.0
hybrid:request_success_total{{finished_reason="stop"}} 40.0
hybrid:request_success_total{{finished_reason="length"}} 2.0
hybrid:time_to_first_token_seconds_bucket{{le="0.5"}} 10.0
"""


class MockServer(ThreadingHTTPServer):
    """Attributes: requests: bodies so far; aborted: set when a client went away in an answer."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.requests: list[dict[str, Any]] = []
        self.aborted = threading.Event()
        self.needs_key = False
        self.started = time.monotonic()
        threading.Thread(target=self.serve_forever, daemon=True).start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/"


class _Handler(BaseHTTPRequestHandler):
    server: MockServer

    def log_message(self, *arguments: Any) -> None:
        pass

    def do_GET(self) -> None:
        path = self.path.partition("?")[0]
        if path in ("/", "/status"):
            name = "index.html" if path == "/" else "status.html"
            self._send(200, (PAGES / name).read_bytes(), "text/html; charset=utf-8")
        elif not self._allowed():
            return
        elif path == "/v1/models":
            meta = {"n_params": 671_000_000_000, "description": "61 layers on the CPU, ISA avx2, 32 threads"}
            models = {"data": [{"id": "demo-model", "max_model_len": 8192, "meta": meta}]}
            self._send(200, json.dumps(models).encode())
        elif path == "/metrics":
            passed = time.monotonic() - self.server.started
            text = METRICS.format(
                queries=1000 + 100 * passed, hits=500 + 80 * passed, written=700 + 20 * passed
            )
            self._send(200, text.encode(), "text/plain")
        else:
            self._send(404, b"{}")

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        self.server.requests.append(body)
        last = body["messages"][-1]["content"]
        if not self._allowed():
            return
        if last == "fail":
            return self._error(429, "too many requests wait", {"retry-after": "7"})
        self.send_response(200)
        self.send_header("content-type", "text/event-stream")
        self.end_headers()
        try:
            for event in _answer(last, body):
                # Cut in the middle of characters and lines, as a network does.
                for start in range(0, len(event), 37):
                    self.wfile.write(event[start : start + 37])
                    self.wfile.flush()
        except OSError:
            self.server.aborted.set()

    def _allowed(self) -> bool:
        allowed = not self.server.needs_key or self.headers.get("authorization") == f"Bearer {API_KEY}"
        if not allowed:
            self._error(401, "an API key is needed")
        return allowed

    def _error(self, status: int, message: str, headers: dict[str, str] | None = None) -> None:
        self._send(status, json.dumps({"error": {"message": message}}).encode(), headers=headers)

    def _send(
        self, status: int, body: bytes, type: str = "application/json", headers: dict[str, str] | None = None
    ) -> None:
        self.send_response(status)
        for name, value in {
            "content-type": type,
            "content-length": str(len(body)),
            **(headers or {}),
        }.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)


def _answer(last: str, body: dict[str, Any]) -> Iterator[bytes]:
    def event(delta: dict[str, str], finish: str | None = None, **extra: Any) -> bytes:
        choice = {"index": 0, "delta": delta, "finish_reason": finish}
        return b"data: " + json.dumps({"choices": [choice], **extra}, ensure_ascii=False).encode() + b"\n\n"

    yield b": ping\n\n"
    yield b'data: {"choices": [], "prompt_progress": {"total": 200, "processed": 100}}\n\n'
    yield event({"role": "assistant", "content": ""})
    if last.startswith("think"):
        for word in ("Let me ", "think about <b>it</b>."):
            yield event({"reasoning_content": word})
            time.sleep(0.05)
    if last == "slow":
        for tick in range(2000):
            yield event({"content": f"tick{tick} "})
            time.sleep(0.02)
    text = {"hello": MARKDOWN, "hostile": HOSTILE}.get(last, f"You said: {last} — é中🦊")
    for start in range(0, len(text), 9):
        yield event({"content": text[start : start + 9]})
        if last == "broken" and start > 9:
            yield b'data: {"error": {"message": "the engine failed"}}\n\n'
            return
    timings = {
        "prompt_n": 20,
        "prompt_per_second": 321.0,
        "predicted_n": 88,
        "predicted_per_second": 23.4,
        "cache_n": 180,
    }
    yield event({}, "stop", timings=timings)
    usage = {"prompt_tokens": 200, "completion_tokens": 88, "total_tokens": 288 * len(body["messages"])}
    yield b"data: " + json.dumps({"choices": [], "usage": usage}).encode() + b"\n\n"
    yield b"data: [DONE]\n\n"
