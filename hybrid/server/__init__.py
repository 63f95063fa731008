"""The HTTP server: OpenAI's protocol over `AsyncLLM`.

`app` puts the endpoints together, `lifecycle` loads the model and ends the process. What a request may cost
is bounded in `connection` (time on the wire), `body` (bytes) and `generation` (what waits to be sent).
"""
