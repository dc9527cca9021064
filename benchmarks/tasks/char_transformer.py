"""T6: a small transformer that predicts the next character of Tiny Shakespeare.

Two layers of width 64 with four heads, LayerNorm before each part, GELU in the fourfold
wider MLP, learned positions, no dropout; batches of 32 pieces of 64 characters, drawn with
replacement from the first nine tenths of the text. The loss is watched on 80 pieces there,
and on 80 of the last tenth for the test. Tuned AdamW is near the target, 1.92, after its
500 steps.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional

from .base import Batch, Task, categorical_loss, seeded
from .data import load_text

WIDTH, HEADS, LAYERS, CONTEXT, BATCH = 64, 4, 2, 64, 32
EVALUATED = 80


class Attention(nn.Module):
    """Causal self-attention, written out so that forward-mode derivatives pass."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH)
        self.out = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        """`[B, T, WIDTH]` to the same."""
        shape = (x.shape[1], HEADS, WIDTH // HEADS)
        q, k, v = (
            part.reshape(len(x), *shape).transpose(1, 2)
            for part in self.qkv(x).chunk(3, dim=-1)
        )
        scores = q @ k.mT / (WIDTH // HEADS) ** 0.5
        future = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).triu(1).to(x.device)
        weights = functional.softmax(scores.masked_fill(future, -torch.inf), dim=-1)
        return self.out((weights @ v).transpose(1, 2).flatten(2))


class Block(nn.Module):
    """Attention and an MLP, each on a normalised input and added to it."""

    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.attention = Attention()
        self.mlp = nn.Sequential(
            nn.Linear(WIDTH, 4 * WIDTH), nn.GELU(), nn.Linear(4 * WIDTH, WIDTH)
        )

    def forward(self, x: Tensor) -> Tensor:
        """`[B, T, WIDTH]` to the same."""
        x = x + self.attention(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class CharTransformer(nn.Module):
    """Numbers of characters `[B, T]` to logits of the next ones `[B, T, characters]`."""

    def __init__(self, characters: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(characters, WIDTH)
        nn.init.normal_(self.embedding.weight, std=0.02)
        self.position = nn.Parameter(0.02 * torch.randn(CONTEXT, WIDTH))
        self.blocks = nn.Sequential(*(Block() for _ in range(LAYERS)))
        self.norm = nn.LayerNorm(WIDTH)
        self.head = nn.Linear(WIDTH, characters)

    def forward(self, x: Tensor) -> Tensor:
        """See the class."""
        hidden = self.embedding(x) + self.position[: x.shape[1]]
        return self.head(self.norm(self.blocks(hidden)))


def pieces(text: Tensor, starts: Tensor) -> Batch:
    """The pieces that begin at these places, and each character's successor."""
    places = starts[:, None] + torch.arange(CONTEXT + 1)
    return text[places[:, :-1]], text[places[:, 1:]]


def spread(text: Tensor) -> Batch:
    """`EVALUATED` pieces, evenly spread over a text."""
    last = len(text) - CONTEXT - 1
    return pieces(text, torch.linspace(0, last, EVALUATED).long())


def random_batches(text: Tensor) -> Callable[[int], Iterator[Batch]]:
    """Pieces from anywhere, drawn with replacement."""

    def batches(seed: int) -> Iterator[Batch]:
        generator = torch.Generator().manual_seed(seed)
        while True:
            yield pieces(
                text, torch.randint(len(text) - CONTEXT, (BATCH,), generator=generator)
            )

    return batches


def make_task(data_dir: Path | None = None) -> Task:
    """Return the task.

    Raises:
        DataMissingError: the text is not at hand.
    """
    text = load_text(data_dir)
    characters = int(text.max()) + 1
    border = len(text) * 9 // 10
    train = text[:border]
    return Task(
        name="T6",
        title="character transformer",
        make_model=seeded(lambda: CharTransformer(characters)),
        batches=random_batches(train),
        loss=categorical_loss,
        kfac_loss="categorical",
        train_cases=spread(train),
        test_cases=spread(text[border:]),
        test_metric="loss",
        target=1.92,
        rival_steps=500,
        kfac_steps=200,
    )
