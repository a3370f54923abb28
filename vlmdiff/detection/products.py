"""Recognise which product an image shows, and that it shows none that is known."""

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F

# Numbers that describe a channel's layout over all channels: few channels get a fine grid, many one cell.
CELLS, FINEST = 256, 8
FOLDS = 5
# Of a variance, as a share of the usual one.
FLOOR = 1e-2
# How much farther than the farthest percent of known images a stranger must be where no other product tells.
ALONE = 1.25


def appearance(latents: torch.Tensor) -> torch.Tensor:
    """Return rows (B, F) that say what images look like as a whole, from latents (B, C, h, w).

    They are the mean of each channel in each cell of a coarse grid, and its standard deviation over the image.
    """
    latents = latents.float()
    grid = min(FINEST, max(1, int((CELLS / latents.shape[1]) ** 0.5)))
    return torch.cat([F.adaptive_avg_pool2d(latents, grid).flatten(1), latents.flatten(2).std(dim=2)], dim=1).cpu()


class Products:
    """The products of a dataset by the appearance of their normal images.

    An image shows the product whose mean appearance is nearest, by the Mahalanobis distance with one covariance for all
    products (Ledoit and Wolf, 2004). Farther than `limit` from all of them, it shows none that is known.

    names: K products; whitening: (F, F); centres: (K, F), whitened.
    """

    def __init__(self, names: Sequence[str], whitening: np.ndarray, centres: np.ndarray, limit: float):
        self.names, self.whitening, self.centres, self.limit = list(names), whitening, centres, limit

    @classmethod
    def fit(cls, rows: np.ndarray, classes: Sequence[str]) -> "Products":
        """Learn from rows (N, F) of `appearance` of normal images, and their products.

        The limit lies between known images, measured by products that were learned without them, and each product as it
        looks to the others: two thirds of the way, in logarithms, from the farthest percent to the nearest twentieth,
        since defects change how a product looks.
        """
        rows, of = rows.astype(np.float64), np.array(classes)
        # Every product is in every fold that has enough images for it.
        fold = np.empty(len(of), int)
        for name in np.unique(of):
            fold[of == name] = np.arange((of == name).sum()) % FOLDS
        known, strangers = [], []
        for part in range(FOLDS):
            if (fold == part).any() and (fold != part).any():
                known.append(
                    cls._fitted(rows[fold != part], of[fold != part])._distances(rows[fold == part]).min(axis=1)
                )
        for name in np.unique(of):
            if (of != name).any():
                strangers.append(cls._fitted(rows[of != name], of[of != name])._distances(rows[of == name]).min(axis=1))
        found = cls._fitted(rows, of)
        if known:
            far = float(np.quantile(np.concatenate(known), 0.99))
            near = float(np.quantile(np.concatenate(strangers), 0.05)) if strangers else ALONE**1.5 * far
            found.limit = max(far, far ** (1 / 3) * near ** (2 / 3))
        return found

    @classmethod
    def _fitted(cls, rows: np.ndarray, of: np.ndarray) -> "Products":
        """Return the products of images, without a limit."""
        from sklearn.covariance import LedoitWolf

        names = np.unique(of)
        means = np.stack([rows[of == name].mean(axis=0) for name in names])
        within = rows - means[np.searchsorted(names, of)]
        # What never varies must not make a product of rounding errors.
        scale = within.std(axis=0) + FLOOR * (rows.std(axis=0).mean() + within.std()) + 1e-12
        covariance = LedoitWolf(assume_centered=True).fit(within / scale).covariance_ + FLOOR * np.eye(rows.shape[1])
        whitening = np.linalg.cholesky(np.linalg.inv(covariance)) / scale[:, None] / rows.shape[1] ** 0.5
        return cls(names.tolist(), whitening, means @ whitening, np.inf)

    def _distances(self, rows: np.ndarray) -> np.ndarray:
        """Return the distances (B, K) of rows (B, F) from the products, the root mean square over their numbers."""
        x = rows.astype(np.float64) @ self.whitening
        return np.linalg.norm(x[:, None] - self.centres, axis=2)

    def __call__(self, rows: np.ndarray) -> tuple[list[str], np.ndarray]:
        """Return the nearest product of each of B images, and whether it is near enough to be known, bool (B,)."""
        distances = self._distances(rows)
        return [self.names[i] for i in distances.argmin(axis=1)], distances.min(axis=1) <= self.limit
