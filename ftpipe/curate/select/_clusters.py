"""Clusters of embeddings, for selectors that choose by them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np


@dataclass(frozen=True)
class Clustering:
    """Clusters of n points. label: (n,) cluster of each point, 0 to k - 1. centre: (k,) index of the point nearest to each cluster's mean.
    distance: (n,) Euclidean distance of each point to its cluster's centre *point* (not to the mean)."""

    label: np.ndarray
    centre: np.ndarray
    distance: np.ndarray


def cluster(points: np.ndarray, k: int, seed: int) -> Clustering:
    """k-means (k-means++ start, Lloyd) of (n, d) points; at most k clusters, fewer if there are fewer different points.

    One thread: the sums of several are added in the order they finish, and the last bits would differ between runs.
    """
    import warnings

    import numpy as np
    from sklearn.cluster import KMeans
    from sklearn.exceptions import ConvergenceWarning
    from threadpoolctl import threadpool_limits

    points = np.ascontiguousarray(points, dtype=np.float64)
    with threadpool_limits(limits=1), warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # fewer different points than clusters
        found = KMeans(n_clusters=k, n_init=1, max_iter=100, random_state=seed, algorithm="lloyd").fit(points)
    used, label = np.unique(found.labels_, return_inverse=True)
    to_mean = np.linalg.norm(points - found.cluster_centers_[found.labels_], axis=1)
    order = np.lexsort((to_mean, label))
    centre = order[np.searchsorted(label[order], np.arange(len(used)))]
    return Clustering(label, centre, np.linalg.norm(points - points[centre[label]], axis=1))


def fewest_clusters(points: np.ndarray, tolerance: float, z: float, seed: int) -> Clustering:
    """The clustering of fewest clusters whose cost, the sum of distance ** z, is at most `tolerance` times that of one cluster.

    Their number is found by doubling it and then halving the gap, so that one with a cluster fewer was tried and is not within the tolerance. (The costs that
    k-means finds need not fall with every cluster more, so a still smaller number may do.)
    """
    import numpy as np

    def cost(found: Clustering) -> float:
        return float((found.distance ** z).sum())

    best, enough, few = cluster(points, 1, seed), 1, 0
    most, limit = len(np.unique(points, axis=0)), tolerance * cost(best)
    while cost(best) > limit:
        few, enough = enough, min(2 * enough, most)
        best = cluster(points, enough, seed)
        if enough == most:
            break
    while enough - few > 1:
        middle = (few + enough) // 2
        found = cluster(points, middle, seed)
        if cost(found) <= limit:
            best, enough = found, middle
        else:
            few = middle
    return best
