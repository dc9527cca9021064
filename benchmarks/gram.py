"""The moment of a linear factor: half of `XᵀX` mirrored, against all of it symmetrised.

    OMP_NUM_THREADS=1 python benchmarks/gram.py [--repeats N] [--json FILE]

Processor time of one thread, both in turn.
"""

import argparse
import functools
import statistics
import time
from pathlib import Path

import torch
from runs import machine, write_json
from torch import Tensor

from kfac_torch.gram import gram

SHAPES = [(1000, 256), (1000, 400), (1000, 512), (500, 800), (1000, 800), (1000, 2048)]


def whole(rows: Tensor) -> Tensor:
    moment = rows.mT @ rows
    return (moment + moment.mT) / 2


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--json", metavar="FILE", help="write the results here")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    results = []
    for shape in SHAPES:
        x = torch.randn(shape)
        runs = {f.__name__: functools.partial(f, x) for f in (gram, whole)}
        times: dict[str, list[float]] = {name: [] for name in runs}
        for _ in range(arguments.repeats + 1):
            for name, run in runs.items():
                start = time.process_time()
                run()
                times[name].append((time.process_time() - start) * 1e3)
        medians = {name: statistics.median(t[1:]) for name, t in times.items()}
        spans = {name: (min(t[1:]), max(t[1:])) for name, t in times.items()}
        ratio = medians["whole"] / medians["gram"]
        print(f"{shape}: {medians} {ratio:.2f}x", flush=True)
        results.append({"shape": shape, "ms": medians, "min, max": spans, "ratio": ratio})
    if arguments.json:
        write_json(Path(arguments.json), {"machine": machine(), "rows": results})


if __name__ == "__main__":
    main()
