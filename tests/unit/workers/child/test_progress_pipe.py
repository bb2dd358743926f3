from __future__ import annotations

import os
import threading

from app.core.child.assignment import Progressed, progress_messages
from workers.child.progress_pipe import ProgressPipe


def test_lines_of_many_threads_stay_whole() -> None:
    read_end, write_end = os.pipe()
    pipe = ProgressPipe(write_end)
    message = Progressed(fraction=0.25, layer=1, layers=4)
    threads = [
        threading.Thread(target=lambda: [pipe.send(message) for _ in range(100)] and None) for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    with os.fdopen(read_end, "rb") as reader:
        lines = [reader.readline() for _ in range(400)]
        for thread in threads:
            thread.join()
        os.close(write_end)
        assert reader.read() == b""
    assert {progress_messages.validate_json(line) for line in lines} == {message}


def test_the_pipe_is_not_inherited() -> None:
    read_end, write_end = os.pipe()
    os.set_inheritable(write_end, True)
    ProgressPipe(write_end)
    assert not os.get_inheritable(write_end)
    os.close(read_end)
    os.close(write_end)
