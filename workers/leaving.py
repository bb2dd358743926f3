"""How a process that has loaded PyTorch ends."""

from __future__ import annotations

import os
import sys
from typing import NoReturn


def leave(code: int) -> NoReturn:
    """End this process with what it said: to take down what libraries have loaded takes up to a second."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
