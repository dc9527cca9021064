"""What a thousand faults do to a training run: nothing should be poisoned, nothing lost.

A small convolutional network and an autoencoder are trained with good batches, between
which faulty ones come at random: NaN and Inf in inputs, targets, gradients, activations
and single micro-batches, factors that are corrupted in place, factorisations that fail,
overflows under a `GradScaler`, exceptions in forward, backward and closure. After every
one it is checked that each parameter, velocity, factor and inverse is finite, and, where
the step had to be left out, that all but the inverses (a refresh may have been due) are
what they were, bit for bit. The end loss is compared with that of a run of the same good
batches, and as many steps, alone. Sixty of the faults are `kill -9` at a random moment to a
process that saves checkpoints in a loop: the file there has to load, and to be the last
that was saved or the one after it, whole.

    python benchmarks/faults.py [--faults 1000] [--seeds 3]
"""

import argparse
import logging
import os
import platform
import random
import signal
import statistics
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from unittest import mock

import torch
from torch import Tensor, nn
from torch.nn import functional

from kfac_torch import KFAC
from kfac_torch.checkpoint import load_checkpoint, save_checkpoint

GOOD_STEPS = 80
KILLS = 60
LONGEST = 0.05  # seconds until a process is killed: a few saves


class ConvNet(nn.Sequential):
    """Images 8x8 in five classes, which a teacher has told apart."""

    loss = "categorical"

    def __init__(self) -> None:
        super().__init__(
            nn.Conv2d(1, 4, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
            nn.Conv2d(4, 8, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(128, 5),
        )  # fmt: skip

    def data(self, n: int) -> tuple[Tensor, Tensor]:
        x = torch.randn(n, 1, 8, 8)
        with torch.no_grad():
            return x, functional.one_hot(type(self)()(x).argmax(1), 5).float()

    @staticmethod
    def criterion(z: Tensor, y: Tensor) -> Tensor:
        return functional.cross_entropy(z, y)


class Autoencoder(nn.Sequential):
    """Binary vectors of 24 bits, made of 4 hidden numbers, through a bottleneck of 6."""

    loss = "bernoulli"

    def __init__(self) -> None:
        super().__init__(
            nn.Linear(24, 16), nn.Tanh(), nn.Linear(16, 6), nn.Linear(6, 16), nn.Tanh(),
            nn.Linear(16, 24),
        )  # fmt: skip

    def data(self, n: int) -> tuple[Tensor, Tensor]:
        x = (torch.randn(n, 4) @ torch.randn(4, 24) > 0).float()
        return x, x.clone()

    @staticmethod
    def criterion(z: Tensor, y: Tensor) -> Tensor:
        # Per example, as a log-likelihood is.
        return functional.binary_cross_entropy_with_logits(z, y, reduction="sum") / len(z)


class Injected(RuntimeError):
    """The exceptions of this benchmark."""


class Run:
    """A training run that faults can be injected into.

    After every fault `check` goes through everything; an AssertionError is a find, which is
    counted in `found` where the run is not strict.
    """

    def __init__(self, task: type, options: dict, seed: int, strict: bool = True) -> None:
        self.strict = strict
        self.found = Counter()
        torch.manual_seed(seed)
        self.random = random.Random(seed)
        self.model = task()
        self.x, self.y = self.model.data(512)
        self.optimizer = KFAC(self.model, task.loss, **options)
        self.faulty = False  # faulty batches have random numbers of their own
        self.batches = [torch.Generator().manual_seed(seed + i) for i in range(2)]
        self.left_out, self.raised = Counter(), Counter()

    # Training.

    def batch(self, n: int = 64) -> tuple[Tensor, Tensor]:
        some = torch.randint(len(self.x), (n,), generator=self.batches[self.faulty])
        return self.x[some].clone(), self.y[some].clone()

    def backward(self, x: Tensor, y: Tensor, scale: float = 1.0) -> None:
        (scale * self.model.criterion(self.model(x), y)).backward()

    def good_step(self) -> None:
        self.optimizer.zero_grad()
        self.backward(*self.batch())
        self.optimizer.step()
        self.check()

    def end_loss(self) -> float:
        self.model.eval()
        with torch.no_grad():
            return self.model.criterion(self.model(self.x), self.y).item()

    # Checks.

    def factors(self) -> list:
        return [f for b in self.optimizer.estimator.blocks.values() for f in b.factors]

    def everything(self) -> list[Tensor]:
        """Parameters, velocities and factors."""
        found = [p.detach() for p in self.model.parameters()]
        for state in self.optimizer.state.values():
            found += [v for v in state.values() if isinstance(v, Tensor)]
        return [tensor.clone() for tensor in found + [f.get_cov() for f in self.factors()]]

    def inverses(self) -> list[Tensor]:
        powers = [p for f in self.factors() for p in f.state_dict()["powers"]]
        return [tensor for power in powers for tensor in power["tensors"]]

    def check(self) -> None:
        found = self.everything() + self.inverses()
        assert all(tensor.isfinite().all() for tensor in found), "poisoned"

    @contextmanager
    def leaving_all_as_it_was(self, kind: str) -> Iterator[None]:
        before, skipped = self.everything(), self.optimizer.skipped_steps
        damping = self.optimizer.param_groups[0]["damping"]
        yield
        after = self.everything()
        assert all(map(torch.equal, before, after)), f"{kind}: changed"
        assert damping == self.optimizer.param_groups[0]["damping"], f"{kind}: λ changed"
        self.left_out[kind] += 1
        if kind in SKIPS:
            assert self.optimizer.skipped_steps == skipped + 1, f"{kind}: not counted"
        self.check()

    # Faults.

    def inject(self, kind: str) -> None:
        """One faulty step, and all checks; the next good step starts with zero_grad."""
        try:
            self._inject(kind)
        except AssertionError:
            if self.strict:
                raise
            self.found[kind] += 1

    def _inject(self, kind: str) -> None:
        self.optimizer.zero_grad()
        bad = self.random.choice([torch.nan, torch.inf, -torch.inf])
        if kind in STEPS:
            getattr(self, kind)(kind)
            return
        self.optimizer.estimator.collecting = self.random.random() < 0.8
        with self.leaving_all_as_it_was(kind):
            getattr(self, kind)(bad)
        self.optimizer.estimator.collecting = True

    def _bad_entry(self, tensor: Tensor, bad: float) -> None:
        tensor.view(-1)[self.random.randrange(tensor.numel())] = bad

    def inputs(self, bad: float) -> None:
        x, y = self.batch()
        self._bad_entry(x, bad)
        self.backward(x, y)
        self.optimizer.step()

    def targets(self, bad: float) -> None:
        x, y = self.batch()
        self._bad_entry(y, bad)
        self.backward(x, y)
        self.optimizer.step()

    def micro_batch(self, bad: float) -> None:
        (x, y), (other, target) = self.batch(32), self.batch(32)
        self._bad_entry(x, bad)
        pair = [(x, y), (other, target)]
        self.random.shuffle(pair)
        for some in pair:
            self.backward(*some, 0.5)
        self.optimizer.step()

    def gradients(self, bad: float) -> None:
        self.backward(*self.batch())
        self._bad_entry(self.random.choice(list(self.model.parameters())).grad, bad)
        self.optimizer.step()

    def _layer(self) -> nn.Module:
        return self.random.choice([m for m in self.model if list(m.parameters())])

    def activations(self, bad: float) -> None:
        x, y = self.batch()

        def spoil(module: nn.Module, args: tuple, z: Tensor) -> Tensor:
            z = z.clone()
            with torch.no_grad():
                self._bad_entry(z, torch.nan)  # a ReLU would make a good number of -Inf
            return z

        handle = self._layer().register_forward_hook(spoil)
        try:
            self.backward(x, y)
        finally:
            handle.remove()
        self.optimizer.step()

    def amp_overflow(self, bad: float) -> None:
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**127)
        forgotten = self.optimizer.health().forgotten_steps
        x, y = self.batch()
        loss = self.model.criterion(self.model(x), y)
        scaler.scale(1e3 * loss).backward()
        scaler.step(self.optimizer)
        scaler.update()
        assert scaler.get_scale() < 2.0**127
        arrived = self.optimizer.estimator.num_terms > 0
        self.optimizer.zero_grad()
        assert self.optimizer.health().forgotten_steps == forgotten + arrived

    def forward_raises(self, bad: float) -> None:
        def fail(*_: object) -> None:
            raise Injected

        self._expect(self._layer().register_forward_hook(fail))

    def backward_raises(self, bad: float) -> None:
        def fail(grad: Tensor) -> None:
            raise Injected

        def watch(module: nn.Module, args: tuple, z: Tensor) -> None:
            z.register_hook(fail)

        self._expect(self._layer().register_forward_hook(watch))

    def _expect(self, handle: torch.utils.hooks.RemovableHandle) -> None:
        try:
            self.backward(*self.batch())
            raise AssertionError("nothing was raised")
        except Injected:
            self.raised["exceptions"] += 1
        finally:
            handle.remove()

    def closure_raises(self, bad: float) -> None:
        def closure() -> Tensor:
            self.optimizer.zero_grad()
            self.backward(*self.batch())
            raise Injected

        try:
            self.optimizer.step(closure)
            raise AssertionError("nothing was raised")
        except Injected:
            self.raised["exceptions"] += 1

    def factor(self, kind: str) -> None:
        """A corrupted factor keeps its inverse; then its good state is loaded again."""
        factor = self.random.choice(self.factors())
        saved = factor.state_dict()
        self._bad_entry(factor.get_cov_var(), torch.nan)
        self.optimizer._schedule.inverses_due = True
        self.backward(*self.batch())
        self.optimizer.step()
        state = factor.state_dict()
        assert state["health"]["kept"] == saved["health"]["kept"] + 1
        assert not state["cov"].isfinite().all()
        factor.load_state_dict({**saved, "health": state["health"]})
        self.check()

    def no_fault(self, kind: str) -> None:
        self.good_step()

    def factorisation(self, kind: str) -> None:
        cholesky, eigh, draw = torch.linalg.cholesky_ex, torch.linalg.eigh, self.random
        worst = draw.choice(["float32 raises", "reports", "all raise"])

        def no_cholesky(C: Tensor) -> tuple[Tensor, Tensor]:
            L, info = cholesky(C)
            if worst == "reports":
                return L, torch.ones_like(info)
            if worst == "float32 raises" and C.dtype == torch.float64:
                return L, info
            raise torch.linalg.LinAlgError("injected")

        def no_eigh(C: Tensor) -> tuple[Tensor, Tensor]:
            if worst == "all raise":
                raise torch.linalg.LinAlgError("injected")
            return eigh(C)

        before = [p.detach().clone() for p in self.model.parameters()]
        self.optimizer._schedule.inverses_due = True
        self.backward(*self.batch())
        with (
            mock.patch("torch.linalg.cholesky_ex", no_cholesky),
            mock.patch("torch.linalg.eigh", no_eigh),
        ):
            try:
                self.optimizer.step()
            except torch.linalg.LinAlgError:  # kept too often, in a row
                self.raised["singular"] += 1
                parameters = [p.detach() for p in self.model.parameters()]
                assert all(map(torch.equal, before, parameters)), "changed"
        self.check()


SKIPS = ("inputs", "targets", "micro_batch", "gradients", "activations")
STEPS = ("factor", "factorisation", "no_fault")  # these take a step
KINDS = (
    *SKIPS,
    "amp_overflow",
    "forward_raises",
    "backward_raises",
    "closure_raises",
    "factor",
    "factorisation",
)
# Refreshes often enough that one succeeds between faults of one factor: three in a row
# that fail are an error, as they should be.
OFTEN = {"cov_update_every": 1, "invert_every": 5}
CLASSIC = {"lr": 0.1, "damping": 0.01, **OFTEN}
TASKS = {"conv net": ConvNet, "autoencoder": Autoencoder}
MODES = {"classic": CLASSIC, "automatic": OFTEN}


def train(
    task: type,
    options: dict,
    seed: int,
    kinds: list[str],
    steps: int = GOOD_STEPS,
    strict: bool = True,
) -> Run:
    """Good steps with faults of these kinds at random between them, after the fifth."""
    run = Run(task, options, seed, strict)
    at = Counter(run.random.randrange(5, steps) for _ in kinds)
    left = list(kinds)
    run.random.shuffle(left)
    for step in range(steps):
        for _ in range(at[step]):
            run.faulty = True
            run.inject(left.pop())
            run.faulty = False
        run.good_step()
    run.optimizer.close()
    return run


# Processes that are killed while they save.


def stamp(run: Run, number: int) -> None:
    """Write a number into parameters and velocities, by which a whole state is known."""
    with torch.no_grad():
        for p in run.model.parameters():
            p.fill_(number)
            for value in run.optimizer.state[p].values():
                value.fill_(number)


def save_for_ever(run: Run, path: Path, number: int, told: int) -> None:
    """Save states with rising numbers, and tell of each that is saved."""
    while True:
        stamp(run, number)
        save_checkpoint(path, run.model, run.optimizer, number=number)
        os.write(told, number.to_bytes(4))
        number += 1


def check_file(run: Run, path: Path, last: int) -> int:
    """Load the file; it has to be the state of this number or the next. Return which."""
    number = load_checkpoint(path, run.model, run.optimizer)["number"]
    assert number in (last, last + 1), f"expected the state {last} or the next: {number}"
    loaded = [p.detach() for p in run.model.parameters()]
    loaded += [v for state in run.optimizer.state.values() for v in state.values()]
    assert all((tensor == number).all() for tensor in loaded), "mixed"
    run.check()
    return number


def kill_while_saving(times: int, seed: int) -> tuple[Counter, int]:
    """Return the finds, and how many kills were in the middle of a file."""
    found, halves = Counter(), 0
    run = Run(ConvNet, CLASSIC, seed)
    for _ in range(5):
        run.good_step()
    run.optimizer.zero_grad()
    with tempfile.TemporaryDirectory() as folder:
        path, number = Path(folder) / "run.pt", 0
        stamp(run, number)
        save_checkpoint(path, run.model, run.optimizer, number=number)
        for _ in range(times):
            listen, told = os.pipe()
            child = os.fork()
            if not child:
                try:
                    save_for_ever(run, path, number + 1, told)
                finally:
                    os._exit(1)
            os.close(told)
            time.sleep(LONGEST * run.random.random())
            os.kill(child, signal.SIGKILL)
            ended = os.WTERMSIG(os.waitpid(child, 0)[1])
            with os.fdopen(listen, "rb") as numbers:
                saved = numbers.read()
            halves += len(list(Path(folder).iterdir())) > 1
            last = int.from_bytes(saved[-4:]) if saved else number
            try:
                assert ended == signal.SIGKILL, "it could not save"
                number = check_file(run, path, last)
            except Exception:  # a file that cannot be read, too
                found["kill_while_saving"] += 1
                number = last
    run.optimizer.close()
    return found, halves


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--faults", type=int, default=1000)
    parser.add_argument("--seeds", type=int, default=3)
    args = parser.parse_args()
    torch.set_num_threads(1)
    logging.getLogger("kfac_torch").setLevel(logging.ERROR)
    warnings.simplefilter("ignore")
    number = args.seeds * len(TASKS) * len(MODES)
    kills = min(KILLS, args.faults)
    pool = [KINDS[i % len(KINDS)] for i in range(args.faults - kills)]
    random.Random(0).shuffle(pool)
    shares = [pool[i::number] for i in range(number)]
    injected, left_out, raised, found = Counter(pool), Counter(), Counter(), Counter()
    health = Counter()
    print(f"torch {torch.__version__}, {platform.machine()}, {args.faults} faults\n")
    print(f"{'task':12} {'mode':10} {'with faults':>12} {'without':>9} {'its range':>16}")
    for task_name, task in TASKS.items():
        for mode, options in MODES.items():
            with_faults, without = [], []
            for seed in range(args.seeds):
                share = shares.pop()
                run = train(task, options, seed, share, strict=False)
                found.update(run.found)
                left_out.update(run.left_out)
                raised.update(run.raised)
                with_faults.append(run.end_loss())
                # As many steps as those that faults do not stop.
                same = ["no_fault" for kind in share if kind in STEPS]
                without.append(train(task, options, seed, same).end_loss())
                for factor in run.factors():
                    health.update(
                        {
                            key: getattr(factor.health, key)
                            for key in ("float64", "jittered", "clamped", "kept")
                        }
                    )
            print(
                f"{task_name:12} {mode:10} {statistics.median(with_faults):12.4f} "
                f"{statistics.median(without):9.4f} "
                f"{min(without):8.4f}-{max(without):.4f}"
            )
    of_files, halves = kill_while_saving(kills, 0)
    found.update(of_files)
    injected["kill_while_saving"] = kills
    print(f"\n{'fault':18} {'injected':>8} {'no step':>8} {'finds':>8}")
    for kind in (*KINDS, "kill_while_saving"):
        print(f"{kind:18} {injected[kind]:8} {left_out[kind]:8} {found[kind]:8}")
    print(f"\nkilled in the middle of a file: {halves} of {kills}")
    print(f"factorisations: {dict(health)}; raised to the caller: {dict(raised)}")


if __name__ == "__main__":
    main()
