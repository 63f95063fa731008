"""`hybrid`: finds the command, runs it, and turns its errors into a message and an exit code."""

from __future__ import annotations

import argparse
import difflib
import importlib
import io
import logging
import os
import sys
import traceback
from collections.abc import Sequence
from types import ModuleType

from hybrid import env
from hybrid.cli import arguments
from hybrid.errors import CapacityError, ConfigError, HybridError, RequestError

# A command module has HELP, add_arguments(parser) and run(args) -> exit code. It imports nothing
# heavy at its top, so that help is instant.
COMMANDS = {
    "run": "hybrid.cli.run",
    "chat": "hybrid.cli.chat",
    "serve": "hybrid.cli.serve",
    "plan": "hybrid.cli.plan",
    "rules": "hybrid.cli.rules",
    "inspect": "hybrid.cli.inspect",
    "bench": "hybrid.cli.bench",
    "perplexity": "hybrid.cli.perplexity",
    "bench-kernels": "hybrid.cli.bench_kernels",
    "bench-serve": "hybrid.cli.bench_serve",
    "bench-load": "hybrid.cli.bench_load",
    "synth": "hybrid.cli.synth",
    "pack": "hybrid.cli.pack",
    "profile": "hybrid.cli.profile",
    "pull": "hybrid.cli.pull",
    "doctor": "hybrid.cli.doctor",
}

EXIT_FAILURE, EXIT_USAGE, EXIT_INTERRUPTED = 1, 2, 130


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command line; returns the exit code: 0, 1 failure, 2 usage, 130 interrupted."""
    try:
        return _main(list(sys.argv[1:] if argv is None else argv))
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return EXIT_INTERRUPTED


def _main(argv: list[str]) -> int:
    if sys.stdout is None:  # started with stdout closed
        print("hybrid: there is no standard output to write to; use > /dev/null to drop it", file=sys.stderr)
        return EXIT_FAILURE
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # what its encoding lacks becomes a question mark
    if not argv or argv[0] not in COMMANDS:
        return _without_command(argv)
    module = importlib.import_module(COMMANDS[argv[0]])
    parser = arguments.Parser(prog=f"hybrid {argv[0]}", description=module.HELP, allow_abbrev=False)
    module.add_arguments(parser)
    arguments.add_general(parser)
    try:
        args = parser.parse_args(argv[1:])
    except SystemExit as stop:
        return int(stop.code or 0)
    return _run(module, args)


def _without_command(argv: list[str]) -> int:
    """`hybrid`, `hybrid --help`, `hybrid --version`, or something that is no command."""
    if argv and not argv[0].startswith("-"):
        near = difflib.get_close_matches(argv[0], COMMANDS, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        print(f"hybrid: unknown command {argv[0]!r}{hint} (see `hybrid --help`)", file=sys.stderr)
        return EXIT_USAGE
    lines = [f"  {name:<15}{importlib.import_module(path).HELP}" for name, path in COMMANDS.items()]
    parser = argparse.ArgumentParser(
        prog="hybrid",
        usage="hybrid COMMAND [options]",
        description="Run Mixture-of-Experts models from GGUF files.\n\ncommands:\n" + "\n".join(lines),
        epilog="`hybrid COMMAND --help` lists a command's options.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="store_true", help="print the version and exit")
    try:
        args = parser.parse_args(argv)
    except SystemExit as stop:
        return int(stop.code or 0)
    if args.version:
        from hybrid import __version__

        print(f"hybrid {__version__}")
        return 0
    parser.print_help(sys.stderr)
    return EXIT_USAGE


def _run(module: ModuleType, args: argparse.Namespace) -> int:
    debug = bool(args.debug) if isinstance(args.debug, bool) else False
    try:
        arguments.resolve(args)
        debug = args.debug
        logging.basicConfig(level=args.log_level.upper(), format="%(levelname)s %(name)s: %(message)s")
        _warn_of_unknown_variables()
        code = int(module.run(args))
        sys.stdout.flush()
        return code
    except BrokenPipeError:
        # Nobody reads any more: leave quietly, also when the interpreter flushes at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_FAILURE
    except Exception as error:
        if debug:
            traceback.print_exc()
        print(f"hybrid: {_message(error)}", file=sys.stderr)
        return _exit_code(error)


def _warn_of_unknown_variables() -> None:
    for name, near in env.unknown().items():
        hint = f"; did you mean {near}?" if near else ""
        print(f"hybrid: warning: environment variable {name} means nothing here{hint}", file=sys.stderr)


def _exit_code(error: Exception) -> int:
    if isinstance(error, ConfigError | RequestError) and not isinstance(error, CapacityError):
        return EXIT_USAGE
    return EXIT_FAILURE


def _message(error: Exception) -> str:
    """One line; a plan that does not fit brings its table."""
    if isinstance(error, CapacityError):
        return str(error)
    if isinstance(error, HybridError):
        text = str(error)
    elif isinstance(error, OSError):
        text = f"{error.filename}: {error.strerror}" if error.filename else error.strerror or str(error)
    elif isinstance(error, MemoryError):
        text = "out of memory"
    else:
        text = f"internal error: {type(error).__name__}: {error} (--debug shows where)"
    return " ".join(text.split())
