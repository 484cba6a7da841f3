# Copyright 2026 The nt_transformers authors. Licensed under the Apache License, Version 2.0.
"""Signals that ask a run to stop: the first one is noted, the second ends the process at once."""

import math
import os
import signal
import threading
import time
from types import FrameType, TracebackType
from typing import Any


SIGNALS = (signal.SIGTERM, signal.SIGINT)

# A launcher passes on what a scheduler or a terminal has sent to the whole process group already.
ECHO_SECONDS = 2.0

# EX_TEMPFAIL of sysexits.h, which schedulers are told to take for "run it again".
INTERRUPTED = 75


class Interrupted(SystemExit):
    """A signal stopped the run after a step; its checkpoint is complete. Ends a program with the code 75."""

    def __init__(self) -> None:
        super().__init__(INTERRUPTED)


class StopSignals:
    """While entered, SIGTERM and SIGINT set `received`. In a thread other than the main one it does nothing."""

    def __enter__(self) -> "StopSignals":
        self._first = math.inf
        self._former: dict[signal.Signals, Any] = {}
        if threading.current_thread() is threading.main_thread():
            self._former = {number: signal.signal(number, self._note) for number in SIGNALS}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._former.items():
            signal.signal(number, handler)

    @property
    def received(self) -> bool:
        return self._first < math.inf

    def _note(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if not self.received:
            self._first = now
            # Not print(): the signal may have come in the middle of one.
            os.write(2, f"\n{signal.Signals(number).name}: stopping after a step; once more ends at once\n".encode())
        elif now - self._first > ECHO_SECONDS:
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)
