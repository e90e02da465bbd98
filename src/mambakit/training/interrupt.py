"""Ctrl-C and SIGTERM as a request: finish the step, save, and leave."""

from __future__ import annotations

import signal
import threading
from pathlib import Path
from types import FrameType
from typing import Any


class Interrupted(Exception):
    """A run that was asked to stop and did, with a checkpoint behind it.

    Args:
        step: Optimiser steps done.
        folder: The run folder.
        signal_name: `SIGINT` or `SIGTERM`.
    """

    def __init__(self, step: int, folder: Path, signal_name: str) -> None:
        super().__init__(
            f"stopped by {signal_name} after step {step}, checkpoint saved in {folder}; "
            "repeat the command with resume=true to go on"
        )
        self.step = step
        self.folder = folder
        self.signal_name = signal_name


class StopRequest:
    """While entered, turns the first SIGINT or SIGTERM into `requested`; a second one acts as usual.

    Outside the main thread Python allows no signal handlers, and nothing is changed.
    """

    def __init__(self) -> None:
        self.requested: str | None = None
        self._previous: dict[signal.Signals, Any] = {}

    def __enter__(self) -> StopRequest:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._previous[number] = signal.signal(number, self._request)
        return self

    def __exit__(self, *exception: object) -> None:
        self._restore()

    def _request(self, number: int, frame: FrameType | None) -> None:
        self.requested = signal.Signals(number).name
        self._restore()

    def _restore(self) -> None:
        while self._previous:
            number, handler = self._previous.popitem()
            signal.signal(number, handler)
