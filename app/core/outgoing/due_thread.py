"""A thread that does what is due in Redis, one thing after the other, until it is stopped."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

from redis.exceptions import RedisError

log = logging.getLogger(__name__)

POLL_S = 0.5


class DueThread(threading.Thread):
    """Calls `do_one` from `parallel` threads; it gives False if nothing is due.

    What is taken and not done, because this process dies or meets an error, is due again by itself.
    """

    def __init__(self, name: str, do_one: Callable[[], bool], *, parallel: int) -> None:
        super().__init__(name=name, daemon=True)
        self._do_one = do_one
        self._parallel = parallel
        self._stopped = threading.Event()

    def run(self) -> None:
        with ThreadPoolExecutor(self._parallel, thread_name_prefix=self.name) as pool:
            for line in [pool.submit(self._work) for _ in range(self._parallel)]:
                line.result()

    def _work(self) -> None:
        while not self._stopped.is_set():
            try:
                has_done_one = self._do_one()
            except RedisError as fault:
                log.warning("%s wait for redis: %s", self.name, fault)
                has_done_one = False
            except Exception:  # the task boundary: it is due again after its hold
                log.exception("%s met an error of their own", self.name)
                has_done_one = False
            if not has_done_one:
                self._stopped.wait(POLL_S)

    def stop(self) -> None:
        self._stopped.set()
        self.join()
