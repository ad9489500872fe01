from __future__ import annotations

from dataclasses import dataclass

TABLE_OPTIMIZERS = ("adam", "adagrad")


@dataclass(frozen=True)
class TrainSettings:
    """How to train.

    Attributes:
        epochs: Most passes over the training split.
        batch_size: Rows in a batch.
        learning_rate: Of Adam, for all that is not an embedding table.
        table_learning_rate: For the embedding tables; None takes `learning_rate`.
        table_optimizer: Of the embedding tables: "adam", or "adagrad" with one number of state per row. The rest always has Adam.
        l2: Weight of the squared norm of the embeddings that a batch looks up, per row of the batch.
        evaluations_per_epoch: Times per epoch that the validation AUC is taken. Logs with many rare ids over-fit within an epoch.
        patience: Evaluations without a new best AUC after which training stops.
        learning_rate_decay: Factor on the learning rates at each evaluation without a new best AUC.
        keep_initial: Whether the weights before the first step count as a candidate for the best, and later ones only if their AUC is above that of
            the first by more than chance and their log loss higher by a thousandth at most. Where tuning went too far, the way of the tables
            alone, and half and a quarter of that of all weights are candidates too.
        seed: Source of the order of the rows and of dropout.
        checkpoint_steps: Steps between checkpoints (there is also one at every evaluation).
    """

    epochs: int = 20
    batch_size: int = 4096
    learning_rate: float = 1e-3
    table_learning_rate: float | None = None
    l2: float = 0.0
    evaluations_per_epoch: int = 1
    patience: int = 2
    learning_rate_decay: float = 1.0
    keep_initial: bool = False
    seed: int = 0
    checkpoint_steps: int = 1000
    table_optimizer: str = "adam"

    def __post_init__(self) -> None:
        if self.table_optimizer not in TABLE_OPTIMIZERS:
            raise ValueError(f"table_optimizer={self.table_optimizer!r} is unknown. Choose one of {list(TABLE_OPTIMIZERS)}.")
        for name in ("epochs", "batch_size", "evaluations_per_epoch", "patience", "checkpoint_steps"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1.")
        for name in ("learning_rate", "table_learning_rate", "learning_rate_decay"):
            value = getattr(self, name)
            if value is not None and not 0 < value < float("inf"):
                raise ValueError(f"{name}={value} must be a number above 0.")
        if not 0 <= self.l2 < float("inf"):
            raise ValueError(f"l2={self.l2} must be 0 or more.")
        if not 0 <= self.seed < 2**63:
            raise ValueError(f"seed={self.seed} must be from 0 to 2**63 - 1.")
