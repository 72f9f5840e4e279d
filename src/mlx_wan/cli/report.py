"""What the command line says on stderr besides the bar: lines for people, or one JSON object a line for programs."""

import json
import os
import sys
import time
from typing import Any

_COLOURS = {"error": "\033[31m", "note": "\033[33m", "hint": "\033[33m"}
_start = time.perf_counter()
_json = False


def use_json(wanted: bool) -> None:
    """From here on, whether stderr is for programs; times count from here."""
    global _json, _start
    _json, _start = wanted, time.perf_counter()


def is_json() -> bool:
    return _json


def say(kind: str, text: str) -> None:
    """One line: `note: ...`, `error: ...`, `hint: ...`, the first word in colour on a terminal without NO_COLOR."""
    text = " ".join(text.split())
    if _json:
        event(kind, message=text)
        return
    word = f"{kind}:"
    if sys.stderr.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb":
        word = f"{_COLOURS[kind]}{word}\033[0m"
    print(f"{word} {text}", file=sys.stderr)


def note(text: str) -> None:
    say("note", text)


def event(kind: str, **facts: Any) -> None:
    """One JSON object on a line of its own: what happened, the seconds since the start, and the facts."""
    line = {"event": kind, "elapsed": round(time.perf_counter() - _start, 3), **facts}
    print(json.dumps(line, ensure_ascii=False), file=sys.stderr, flush=True)
