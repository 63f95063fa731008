"""Options of the server as one frozen value."""

from __future__ import annotations

from dataclasses import dataclass

from hybrid.errors import ConfigError

MIB = 1 << 20


@dataclass(frozen=True)
class ServerSettings:
    """What `hybrid serve` is told.

    Attributes:
        host, port: where to listen; port 0 takes a free one.
        api_keys: any of them opens everything; none: everyone who reaches the port may use it.
        model_names: names that requests may call the model by; the first is shown.
        allowed_hosts: names in a Host header that are taken, besides this machine's, when there is no key.
        cors_origins: web origins that may call from a browser.
        max_queue: requests that may wait, for a place in the engine or for their prompt to be rendered.
        max_body: bytes of a request's body.
        header_timeout_s, body_timeout_s: a request's headers, or its body, must be there after this time.
        send_timeout_s: a client that takes nothing for this long is cut off.
        render_timeout_s: a request that is not rendered and checked after this time is refused.
        shutdown_timeout_s: how long requests may go on after the first SIGTERM or SIGINT.
        ping_s: a stream that has nothing to say sends a comment this often.
        log_prompts: write prompts and answers to the log.
    """

    host: str = "127.0.0.1"
    port: int = 8000
    api_keys: tuple[str, ...] = ()
    model_names: tuple[str, ...] = ("demo",)
    allowed_hosts: tuple[str, ...] = ()
    cors_origins: tuple[str, ...] = ()
    max_queue: int = 256
    max_body: int = 8 * MIB
    header_timeout_s: float = 10.0
    body_timeout_s: float = 30.0
    send_timeout_s: float = 30.0
    render_timeout_s: float = 30.0
    shutdown_timeout_s: float = 60.0
    ping_s: float = 15.0
    log_prompts: bool = False

    def __post_init__(self) -> None:
        if any(not key or not key.isascii() or key != key.strip() for key in self.api_keys):
            raise ConfigError("--api-key: expected ASCII text without spaces around it, not empty")
        if "*" in self.cors_origins and not self.api_keys:
            raise ConfigError(
                "--cors-origins *: any web page could use this server; set --api-key too, or name the origins"
            )
