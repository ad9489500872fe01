"""The default fit against the second stage of MEC as its paper has it: `python benchmarks/speed/against_mec_paper.py`.

The paper (arXiv 2502.15355) learns code books and codes by gradient steps: an encoder, code books drawn at random, the nearest code word of
each part with a straight-through gradient, Adam at 1e-4, batches of 8000 rows, up to 100 passes with a patience of 10. That is written here in
plain torch, with the commitment of van den Oord et al. (2017), which the published code defines and does not use, and without the losses that
do not lower the error (balance and contrast), which would only take longer. Both compress the same table to the same size. The ratio is of
the processor seconds: the paper's until its error is down to that of the default fit, or until it stops, and the default fit. One thread each.
"""

from __future__ import annotations

import time

import torch
import torch.nn.functional as F
from record import write
from torch import Tensor, nn

from leanrec import PQ

NUM_EMBEDDINGS, EMBEDDING_DIM, NUM_SUBSPACES, NUM_CENTROIDS = 100_000, 40, 4, 256
BATCH_SIZE, LEARNING_RATE, COMMITMENT = 8000, 1e-4, 0.25
MAX_EPOCHS, PATIENCE = 100, 10


class PaperQuantizer(nn.Module):
    """Encoder and code books (M, K, D / M)."""

    def __init__(self, generator: torch.Generator) -> None:
        super().__init__()
        self.encoder = nn.Parameter(torch.eye(EMBEDDING_DIM))
        words = torch.rand(NUM_SUBSPACES, NUM_CENTROIDS, EMBEDDING_DIM // NUM_SUBSPACES, generator=generator)
        self.codebooks = nn.Parameter((2 * words - 1) / NUM_CENTROIDS)

    def forward(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """What rows (N, D) are rebuilt as, the nearest code words side by side, and what the step makes small."""
        latent = (rows @ self.encoder).view(len(rows), NUM_SUBSPACES, -1).transpose(0, 1)
        words = self.codebooks
        codes = (2 * latent @ words.transpose(1, 2) - words.square().sum(-1).unsqueeze(1)).argmax(-1)
        chosen = words.gather(1, codes.unsqueeze(-1).expand(-1, -1, words.shape[-1]))
        target = rows.view(len(rows), NUM_SUBSPACES, -1).transpose(0, 1)
        loss = F.mse_loss(chosen + latent - latent.detach(), target) + COMMITMENT * F.mse_loss(latent, chosen.detach())
        return chosen.transpose(0, 1).flatten(1), loss


def paper_fit(weight: Tensor, goal: float) -> tuple[float, float, int]:
    """Least mean squared error, processor seconds and passes until the goal, or the end, is reached."""
    generator = torch.Generator().manual_seed(0)
    quantizer, best, since, epochs = PaperQuantizer(generator), float("inf"), 0, 0
    optimizer = torch.optim.Adam(quantizer.parameters(), lr=LEARNING_RATE)
    start = time.process_time()
    while epochs < MAX_EPOCHS:
        total, epochs = 0.0, epochs + 1
        for ids in torch.randperm(len(weight), generator=generator).split(BATCH_SIZE):
            rows = weight[ids]
            rebuilt, loss = quantizer(rows)
            total += float((rebuilt.detach() - rows).square().sum())
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        since = 0 if total / len(weight) < best else since + 1
        best = min(best, total / len(weight))
        if best <= goal or since == PATIENCE:
            break
    return best, time.process_time() - start, epochs


def main() -> None:
    """Measure, and keep the result."""
    torch.set_num_threads(1)
    draws = torch.Generator().manual_seed(0)
    centres = torch.randn(1000, EMBEDDING_DIM, generator=draws)
    # Groups of rows in the scale of a trained table.
    noise = torch.randn(NUM_EMBEDDINGS, EMBEDDING_DIM, generator=draws)
    weight = 0.1 * (centres[torch.randint(1000, (NUM_EMBEDDINGS,), generator=draws)] + noise)
    method = PQ(num_subspaces=NUM_SUBSPACES, num_centroids=NUM_CENTROIDS)
    taken = []
    for _ in range(5):
        start = time.process_time()
        table = method.build(NUM_EMBEDDINGS, EMBEDDING_DIM).fit(weight)
        taken.append(time.process_time() - start)
    ours = sorted(taken)[2]
    our_error = float((table.decode() - weight).square().sum(1).mean())
    their_error, theirs, epochs = paper_fit(weight, our_error)
    write(
        "against_mec_paper",
        ratio=theirs / ours,
        bar=20,
        against="the gradient-trained quantizer of MEC's second stage",
        medians={"leanrec CPU s": ours, "paper CPU s": theirs, "leanrec squared error": our_error, "paper squared error": their_error},
        setting={"rows": NUM_EMBEDDINGS, "dim": EMBEDDING_DIM, "method": repr(method), "batch size": BATCH_SIZE, "epochs": epochs, "threads": 1},
        note=f"after {epochs} passes its error is {their_error / our_error:.2f} times ours",
    )


if __name__ == "__main__":
    main()
