"""A process that serves a mock: ``mock_server.py '{"step_s": 0.1, "settings": {...}, "load_s": 5}'``."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

from mock_llm import MockLLM, mock_card

from hybrid.cli.serve import _log_to_stderr
from hybrid.server.lifecycle import serve
from hybrid.server.settings import ServerSettings

script = json.loads(sys.argv[1])
settings = ServerSettings(**{"port": 0, **script.pop("settings", {})})
load_s, deaf = script.pop("load_s", 0.0), script.pop("deaf", False)


def load(progress):
    """Takes its time; a deaf load never looks whether it is wanted."""
    end = time.monotonic() + load_s
    while time.monotonic() < end:
        if not deaf:
            progress(int(1000 * (end - time.monotonic())), int(1000 * load_s))
        time.sleep(0.02)
    engine = MockLLM(**script)
    return engine, mock_card(engine)


_log_to_stderr("info")
sys.exit(serve(settings, load))
