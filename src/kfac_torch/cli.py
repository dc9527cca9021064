"""`kfac-torch`: the command line."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch

from .demo import DATA_NAMES, DemoError, run_demo
from .view import ViewError, write_view


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command line; `argv` defaults to the process's arguments."""
    parser = _parser()
    arguments = parser.parse_args(argv)
    try:
        arguments.run_command(arguments)
    except (DemoError, ViewError) as error:
        parser.error(str(error))


def _demo(arguments: argparse.Namespace) -> None:
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    run_demo(
        arguments.data, arguments.data_dir, arguments.out, arguments.seed, arguments.scale
    )


def _view(arguments: argparse.Namespace) -> None:
    write_view(arguments.run, arguments.out)
    print(f"report: {arguments.out.resolve()}")


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
    demo.set_defaults(run_command=_demo)
    view = commands.add_parser(
        "view",
        help="make a page of pictures of a run that was recorded",
        description="Write a self-contained HTML page of a run that a "
        "kfac_torch.telemetry.JSONLWriter recorded.",
        allow_abbrev=False,
    )
    view.add_argument("run", type=Path, metavar="RUN.jsonl", help="the records")
    view.add_argument(
        "-o",
        "--out",
        type=Path,
        default=Path("report.html"),
        metavar="FILE",
        help="the page",
    )
    view.set_defaults(run_command=_view)
    return parser


def _positive(text: str) -> float:
    number = float(text)
    if not 0 < number < float("inf"):
        raise argparse.ArgumentTypeError(f"expected a positive number, got {text}")
    return number
