"""`hybrid serve`: answer over HTTP."""

from __future__ import annotations

import argparse
import ipaddress
import logging
import sys
from typing import TYPE_CHECKING

from hybrid.cli import arguments
from hybrid.cli.progress import byte_progress
from hybrid.errors import ConfigError

if TYPE_CHECKING:
    from hybrid.server.lifecycle import Load
    from hybrid.server.settings import ServerSettings

HELP = "serve a model over HTTP: OpenAI's protocol, metrics, a chat page"
_NEEDED = ("fastapi", "uvicorn", "pydantic", "prometheus_client", "h11")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    arguments.add_model(parser)
    group = parser.add_argument_group("server")
    arguments.flag(group, "--host", default="127.0.0.1")
    arguments.flag(group, "--port", default=8000)
    arguments.flag(group, "--api-key", action=arguments.Extend)
    arguments.flag(group, "-a", "--alias", action=arguments.Extend, metavar="NAME")
    arguments.flag(group, "--allowed-hosts", action=arguments.Extend)
    arguments.flag(group, "--cors-origins", action=arguments.Extend)
    arguments.flag(group, "-np", "--parallel", default=8)
    arguments.flag(group, "-ub", "--ubatch-size", default=512)
    arguments.flag(group, "--kv-cache-tokens")
    arguments.flag(group, "--max-queue", default=256)
    arguments.flag(group, "--queue-timeout")
    arguments.flag(group, "--log-prompts")
    arguments.flag(group, "-s", "--seed", default=0)
    limits = parser.add_argument_group("limits")
    arguments.flag(limits, "--max-body", default=8 << 20)
    arguments.flag(limits, "--header-timeout", default=10.0)
    arguments.flag(limits, "--body-timeout", default=30.0)
    arguments.flag(limits, "--send-timeout", default=30.0)
    arguments.flag(limits, "--shutdown-timeout", default=60.0)
    arguments.add_runtime(parser)


def run(args: argparse.Namespace) -> int:
    try:
        from hybrid.server.lifecycle import serve
    except ModuleNotFoundError as error:
        raise _missing(error) from None
    from hybrid.config import model_path

    path = model_path(args.model)
    arguments.rules_for(args, args.model)  # a bad file or rule is told before the port is taken
    arguments.end_on_bus_error(args)
    settings = server_settings(args, path.stem if args.model != "demo" else "demo")
    _log_to_stderr(args.log_level)
    if not settings.api_keys and not _is_loopback(settings.host):
        print(
            f"hybrid: warning: anybody who reaches {settings.host} can use this server; set --api-key",
            file=sys.stderr,
        )
    return serve(settings, loader(args, settings))


def server_settings(args: argparse.Namespace, model_name: str) -> ServerSettings:
    """What the flags say.

    Raises:
        ConfigError: they contradict each other.
    """
    from hybrid.server.settings import ServerSettings

    return ServerSettings(
        host=args.host,
        port=args.port,
        api_keys=_several(args.api_key),
        model_names=_several(args.alias) or (model_name,),
        allowed_hosts=_several(args.allowed_hosts),
        cors_origins=_several(args.cors_origins),
        max_queue=args.max_queue,
        max_body=args.max_body,
        header_timeout_s=args.header_timeout,
        body_timeout_s=args.body_timeout,
        send_timeout_s=args.send_timeout,
        shutdown_timeout_s=args.shutdown_timeout,
        log_prompts=args.log_prompts,
    )


def loader(args: argparse.Namespace, settings: ServerSettings) -> Load:
    """What loads the model that the flags describe."""
    from hybrid.config import model_path
    from hybrid.server.engine_api import AsyncEngine
    from hybrid.server.lifecycle import Progress
    from hybrid.server.model_card import ModelCard

    def load(progress: Progress) -> tuple[AsyncEngine, ModelCard]:
        from hybrid.async_llm import AsyncLLM

        with byte_progress("loading") as show:

            def tell(done: int, total: int) -> None:
                progress(done, total)
                show(done, total)

            engine = AsyncLLM(
                args.model,
                arguments.rules_for(args, args.model),
                args.ctx_size,
                progress=tell,
                seed=args.seed,
                max_num_seqs=args.parallel,
                max_num_batched_tokens=max(args.ubatch_size, args.parallel),
                kv_cache_tokens=args.kv_cache_tokens,
                max_queue=args.max_queue,
                max_queue_wait_s=args.queue_timeout,
                **arguments.runtime_options(args),
            )
        return engine, ModelCard.of(model_path(args.model), settings.model_names, engine)

    return load


def _several(value: str | list[str] | tuple[str, ...] | None) -> tuple[str, ...]:
    return (value,) if isinstance(value, str) else tuple(value or ())


def _missing(error: ModuleNotFoundError) -> ConfigError:
    if error.name is not None and error.name.partition(".")[0] in _NEEDED:
        return ConfigError(f"serving needs the package {error.name}: pip install 'hybrid-moe[server]'")
    raise error


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _log_to_stderr(level: str) -> None:
    """The server's own log, one line a request, also where other parts keep quiet."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("%(asctime)s %(message)s"))
    log = logging.getLogger("hybrid.server")
    log.addHandler(handler)
    log.propagate = False
    log.setLevel({"warning": "INFO"}.get(level, level.upper()))
