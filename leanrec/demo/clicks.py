"""The synthetic click log of the demo: Zipf-distributed ids, and clicks that follow a planted preference of users for items."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import polars as pl
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Ids = NDArray[np.int64]

NUM_COMMUNITIES, NUM_CATEGORIES, LATENT_DIM = 12, 60, 3
DEVICES = ("phone", "tablet", "desktop", "tv")
HOURS = tuple(f"{hour:02d}h" for hour in range(24))

# Standard deviations of the parts of the planted logit. Together they put the AUC of the true click probabilities at about 0.86.
PREFERENCE, USER_BIAS, ITEM_BIAS, DEVICE_EFFECT, HOUR_EFFECT = 1.8, 0.3, 0.4, 0.4, 0.2
MEAN_LOGIT = -1.0
OWN_SHARE = 0.05  # share of a latent vector's variance that is a user's or an item's own; the rest is that of its community or category


@dataclass(frozen=True)
class Clicks:
    """A click log and the truth behind it.

    Attributes:
        rows: Columns click (0 or 1), user, item, category, device and hour, all text but the first.
        probabilities: (N,) with which each row was a click. No model can do better than to know them.
    """

    rows: pl.DataFrame
    probabilities: Floats


def draw_clicks(num_rows: int, *, num_users: int, num_items: int, seed: int) -> Clicks:
    """A log of `num_rows` rows; the same arguments give the same log.

    Users and items have latent vectors that lie in clusters, around their community (which no column tells) or their category (which one does),
    and biases of their own. A click depends on the product of the two vectors, the biases, the device for this category, and the hour.

    Args:
        num_rows: N.
        num_users: Users that there are; the rarest of them may have no row.
        num_items: Items that there are.
        seed: Source of everything that is drawn.
    """
    # A stream of its own: `prepare` splits rows with default_rng(seed), and the same numbers would put each user's rows into one split.
    draw = np.random.default_rng([seed, *b"clicks"])
    users, items = _zipf(draw, num_users, num_rows, offset=20), _zipf(draw, num_items, num_rows, offset=10)
    devices, hours = draw.integers(0, len(DEVICES), num_rows), draw.integers(0, len(HOURS), num_rows)
    communities, categories = draw.integers(0, NUM_COMMUNITIES, num_users), _zipf(draw, NUM_CATEGORIES, num_items, offset=5)
    user_vectors, item_vectors = _clustered(draw, communities, NUM_COMMUNITIES), _clustered(draw, categories, NUM_CATEGORIES)
    device_effects = draw.normal(size=(NUM_CATEGORIES, len(DEVICES)))

    logits = MEAN_LOGIT + PREFERENCE / np.sqrt(LATENT_DIM) * np.einsum("nd,nd->n", user_vectors[users], item_vectors[items])
    logits += USER_BIAS * draw.normal(size=num_users)[users] + ITEM_BIAS * draw.normal(size=num_items)[items]
    logits += DEVICE_EFFECT * device_effects[categories[items], devices] + HOUR_EFFECT * draw.normal(size=len(HOURS))[hours]
    probabilities = 1 / (1 + np.exp(-logits))
    columns = {
        "click": (draw.random(num_rows) < probabilities).astype(np.int8),
        "user": _names("u", users),
        "item": _names("i", items),
        "category": _names("c", categories[items]),
        "device": pl.Series(DEVICES).gather(devices),
        "hour": pl.Series(HOURS).gather(hours),
    }
    return Clicks(pl.DataFrame(columns), probabilities)


def _zipf(draw: np.random.Generator, num_ids: int, num_draws: int, *, offset: int) -> Ids:
    """(num_draws,) ids in [0, num_ids); the id of rank r, a random one, has a probability in proportion to 1 / (r + offset)."""
    cumulative = np.cumsum(1 / (np.arange(num_ids) + offset))
    ranks = np.searchsorted(cumulative, draw.random(num_draws) * cumulative[-1])
    return draw.permutation(num_ids)[ranks]


def _clustered(draw: np.random.Generator, clusters: Ids, num_clusters: int) -> Floats:
    """(len(clusters), LATENT_DIM) vectors of unit variance around the centres of their clusters."""
    centres = draw.normal(size=(num_clusters, LATENT_DIM))
    own = draw.normal(size=(len(clusters), LATENT_DIM))
    return np.sqrt(1 - OWN_SHARE) * centres[clusters] + np.sqrt(OWN_SHARE) * own


def _names(letter: str, ids: Ids) -> pl.Series:
    """Raw values such as "u123"."""
    return letter + pl.Series(ids).cast(pl.String)
