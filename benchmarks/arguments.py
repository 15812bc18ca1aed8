"""What the scripts' arguments may be. A mistake is told at once, in one line, and not after minutes of measuring."""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Callable
from pathlib import Path


def count(text: str) -> int:
    value = int(text)  # argparse names the argument if this raises
    if value < 1:
        raise argparse.ArgumentTypeError(f"expected at least 1, got {text}")
    return value


def amount(text: str) -> float:
    value = float(text)
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"expected a finite number above 0, got {text}")
    return value


def output(text: str) -> Path:
    path = Path(text)
    if path.is_dir() or not path.parent.is_dir():
        raise argparse.ArgumentTypeError(f"{text}: expected a file's name, in a folder that exists")
    return path


def run_script(main: Callable[[], int | None]) -> None:
    """Run a script to its end; what the person at the keyboard can mend is one line."""
    from fastppo.errors import FastPPOError, one_line  # here, since gpu.py finds fastppo later

    try:
        sys.exit(main())
    except (FastPPOError, OSError, ImportError) as error:
        sys.exit(f"{Path(sys.argv[0]).name}: {one_line(error)}")
