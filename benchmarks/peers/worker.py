"""A peer's side of a benchmark in turns: shapes and turns come in, milliseconds go out.

Each peer is a process of its own, with its own Python and packages. Lines of JSON on
standard input: a shape, which is prepared and answered by the trace of the moment, then
`"run"`, answered by the processor time of one call. Anything that a library prints to
standard output goes to standard error.
"""

import json
import os
import sys
import time
from collections.abc import Callable

import numpy as np

Prepare = Callable[[np.ndarray, int, int], Callable[[], np.ndarray]]


def inputs(batch: int, channels: int, size: int) -> np.ndarray:
    """The numbers that all of them see, `[N, C, H, W]`."""
    count = batch * channels * size * size
    x = (np.arange(count, dtype=np.int64) * 7919) % 101
    return (x / 101).astype(np.float32).reshape(batch, channels, size, size)


def serve(prepare: Prepare, version: str) -> None:
    """Answer until standard input ends.

    Args:
        prepare: takes inputs, kernel size and stride, padded "SAME"; returns a call that
            computes the second moment of the patches.
        version: of the peer and what it runs on.
    """
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)

    def answer(value: object) -> None:
        print(json.dumps(value), file=answers, flush=True)

    answer(version)
    run: Callable[[], np.ndarray] | None = None
    for line in sys.stdin:
        asked = json.loads(line)
        if asked == "run" and run is not None:
            start = time.process_time()
            run()
            answer((time.process_time() - start) * 1e3)
            continue
        channels, size, kernel, batch, stride = asked
        try:
            run = prepare(inputs(batch, channels, size), kernel, stride)
            answer(float(np.trace(run())))
        except Exception as error:  # whatever a peer cannot do is its answer
            answer(f"{type(error).__name__}: {str(error)[:200]}")
