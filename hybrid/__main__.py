"""The command line: `hybrid`, and `python -m hybrid`.

Where Ctrl-C raises, an import it breaks off ends in a traceback. So it ends the process outright, as it does
where there is no Python, until `main` can say so and again once it is done.
"""

import signal

_RAISES = signal.getsignal(signal.SIGINT) is signal.default_int_handler  # not where it is ignored
if _RAISES:
    signal.signal(signal.SIGINT, signal.SIG_DFL)

import sys  # noqa: E402

from hybrid.cli.main import EXIT_INTERRUPTED, main  # noqa: E402


def run() -> int:
    """Run the command line of this process; returns its exit code."""
    try:
        if _RAISES:
            signal.signal(signal.SIGINT, signal.default_int_handler)
        return main()
    except KeyboardInterrupt:  # before or after what `main` guards
        return EXIT_INTERRUPTED
    finally:
        if _RAISES:
            signal.signal(signal.SIGINT, signal.SIG_DFL)


if __name__ == "__main__":
    sys.exit(run())
