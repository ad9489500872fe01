import faiss
import pytest
import torch

from leanrec.ops.kmeans import ClusterMeans, kmeans, nearest, sample_rows, squared_distances


def seeded(seed):
    return torch.Generator().manual_seed(seed)


def error(points, centroids, weights=None):
    distances = torch.cdist(points, centroids).square().amin(1)
    return float((distances * weights).sum() / weights.sum()) if weights is not None else float(distances.mean())


@pytest.mark.parametrize(("num_points", "dim", "num_clusters"), [(20_000, 8, 64), (5_000, 16, 16), (600, 2, 256), (2_000, 4, 2)])
def test_error_is_within_2_percent_of_faiss(num_points, dim, num_clusters):
    points = torch.randn(num_points, dim, generator=seeded(0))
    reference = faiss.Kmeans(dim, num_clusters, niter=25, seed=1, max_points_per_centroid=10**6, min_points_per_centroid=1)
    reference.train(points.numpy())
    ours = kmeans(points, num_clusters, generator=seeded(1))
    assert error(points, ours) <= 1.02 * error(points, torch.from_numpy(reference.centroids))


def test_planted_clusters_are_found():
    # A cluster already drawn from is a million times less likely than another one to be drawn from again.
    centres = 10 * torch.randn(30, 5, generator=seeded(2))
    points = centres.repeat(50, 1) + 0.01 * torch.randn(1500, 5, generator=seeded(3))
    found = kmeans(points, 30, generator=seeded(4))
    assert torch.cdist(centres.double(), found.double()).amin(1).max() < 0.02


def test_few_distinct_points_are_the_centroids_and_the_last_is_repeated():
    distinct = torch.tensor([[0.0, 1.0], [2.0, 0.0], [3.0, 3.0]])
    centroids = kmeans(distinct.repeat(100, 1), 5)
    assert torch.equal(centroids, distinct[[0, 1, 2, 2, 2]])


def test_a_point_with_all_the_weight_is_a_centroid():
    points = torch.randn(500, 4, generator=seeded(5))
    weights = torch.full((500,), 1e-3)
    weights[137] = 1e6
    centroids = kmeans(points, 8, weights=weights, generator=seeded(6))
    assert torch.cdist(points[137:138], centroids).min() < 1e-3


def test_weights_count_like_repetitions():
    points = torch.randn(400, 3, generator=seeded(7))
    weights = torch.randint(1, 30, (400,), generator=seeded(8))
    weighted = kmeans(points, 10, weights=weights.float(), generator=seeded(9))
    repeated = kmeans(points.repeat_interleave(weights, dim=0), 10, generator=seeded(9))
    assert error(points, weighted, weights) == pytest.approx(error(points, repeated, weights), rel=0.05)
    assert error(points, weighted, weights) < error(points, kmeans(points, 10, generator=seeded(9)), weights)


def test_no_cluster_stays_empty():
    # The start draws two points at a time; one place has nearly all the weight, so both are often the same.
    places = 10 * torch.randn(100, 2, generator=seeded(10))
    points = places.repeat(20, 1)
    weights = torch.tensor([1000.0] * 5 + [0.01] * 95).repeat(20)
    centroids = kmeans(points, 64, weights=weights, generator=seeded(11))
    assert len(nearest(points, centroids).unique()) == 64


def test_nearest_is_the_smallest_distance():
    points, centroids = torch.randn(3000, 7, generator=seeded(12)), torch.randn(300, 7, generator=seeded(13))
    expected = torch.cdist(points.double(), centroids.double()).argmin(1)
    assert (nearest(points, centroids) == expected).float().mean() > 0.999  # float32 decides near ties either way
    assert squared_distances(points, centroids[expected]).mean() == pytest.approx(error(points, centroids), rel=1e-5)


def test_same_generator_same_centroids():
    points = torch.randn(1000, 4, generator=seeded(14))
    assert torch.equal(kmeans(points, 50, generator=seeded(1)), kmeans(points, 50, generator=seeded(1)))
    assert not torch.equal(kmeans(points, 50, generator=seeded(1)), kmeans(points, 50, generator=seeded(2)))


def test_cluster_means_are_weighted_and_an_empty_cluster_keeps_its_start():
    means = ClusterMeans(torch.tensor([[9.0], [8.0], [7.0]]))
    means.add(torch.tensor([[1.0], [4.0]]), torch.tensor([0, 0]), torch.tensor([1.0, 2.0]))
    means.add(torch.tensor([[5.0]]), torch.tensor([1]), torch.tensor([3.0]))
    assert torch.equal(means.value(), torch.tensor([[3.0], [5.0], [7.0]]))


def test_a_small_set_is_not_sampled():
    weights = torch.rand(1000, generator=seeded(15))
    rows, sampled = sample_rows(weights, 4, generator=seeded(16))
    assert torch.equal(rows, torch.arange(1000))
    assert torch.equal(sampled, weights)


def test_a_sample_keeps_the_head_and_stands_for_the_whole():
    weights = 1 / (1 + torch.arange(100_000)) ** 1.1
    values = torch.rand(100_000, generator=seeded(17))
    rows, sampled = sample_rows(weights, 4, generator=seeded(18))
    assert len(rows) <= 1024 and torch.equal(rows, rows.unique())
    assert torch.equal(rows[:20], torch.arange(20))
    whole = (weights * values).sum() / weights.sum()
    assert float((sampled * values[rows]).sum() / sampled.sum()) == pytest.approx(float(whole), rel=0.05)
    # A row is drawn the whole number of times on either side of its share.
    assert (sampled - weights[rows] / weights.sum() * 1024).abs().max() < 1.01


def test_large_numbers_of_clusters_get_at_least_32_rows_each():
    rows, _ = sample_rows(torch.ones(1_000_000), 8192, generator=seeded(19))
    assert len(rows) == 32 * 8192
