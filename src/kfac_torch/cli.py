"""`kfac-torch`: the command line."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch

from .demo import DATA_NAMES, DemoError, run_demo


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command line; `argv` defaults to the process's arguments."""
    parser = _parser()
    arguments = parser.parse_args(argv)
    try:
        if arguments.threads:
            torch.set_num_threads(arguments.threads)
        run_demo(
            arguments.data,
            arguments.data_dir,
            arguments.out,
            arguments.seed,
            arguments.scale,
        )
    except DemoError as error:
        parser.error(str(error))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="kfac-torch", description="K-FAC for PyTorch", allow_abbrev=False
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    demo = commands.add_parser(
        "demo",
        help="train with K-FAC beside tuned SGD and AdamW, and write a report",
        description="Train a convolutional net and a deep autoencoder with K-FAC, SGD and "
        "AdamW, print a table and write a self-contained HTML report.",
        allow_abbrev=False,
    )
    demo.add_argument(
        "--data",
        choices=DATA_NAMES,
        default="digits",
        help="the digits come with scikit-learn; the others need --data-dir",
    )
    demo.add_argument(
        "--data-dir", type=Path, metavar="DIR", help="the folder of the four IDX files"
    )
    demo.add_argument(
        "--out", type=Path, default=Path("report.html"), metavar="FILE", help="the report"
    )
    demo.add_argument(
        "--seed", type=int, default=0, help="of the split, the weights and the batches"
    )
    demo.add_argument(
        "--scale",
        type=_positive,
        default=1.0,
        metavar="X",
        help="take X times as many steps",
    )
    demo.add_argument(
        "--threads",
        type=int,
        choices=range(1, 257),
        metavar="N",
        help="torch's; on a machine that others use too, 1 is often the fastest",
    )
    return parser


def _positive(text: str) -> float:
    number = float(text)
    if not 0 < number < float("inf"):
        raise argparse.ArgumentTypeError(f"expected a positive number, got {text}")
    return number
