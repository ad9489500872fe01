import os
import subprocess
import sys

import pytest

MIB = 2**20

# A weight of V rows that takes the memory of V numbers: row i is a window of a long vector. What grows with V is then what the fit holds.
PROGRAM = """
import sys, torch
from leanrec import runs
from leanrec.methods import parse
torch.set_num_threads(1)
num_embeddings, embedding_dim = int(sys.argv[2]), 64
weight = torch.randn(num_embeddings + embedding_dim, generator=torch.Generator().manual_seed(0)).as_strided((num_embeddings, embedding_dim), (1, 1))
parse(sys.argv[1]).build(20_000, embedding_dim).fit(weight[:20_000])  # what a first fit loads is not counted
table = parse(sys.argv[1]).build(num_embeddings, embedding_dim)
runs.reset_peak_memory()
before = runs.peak_memory()
table.fit(weight)
print(runs.peak_memory() - before)
"""


def peak_of_fit(method, num_embeddings):
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": str(MIB)}  # glibc gives back what is freed, and does not keep it by chance
    command = [sys.executable, "-c", PROGRAM, method, str(num_embeddings)]
    run = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    return int(run.stdout)


@pytest.mark.parametrize(
    "method",
    [
        "Scalar(num_bits=8)",
        "PQ(num_subspaces=2, num_centroids=16)",
        "RQ(num_levels=2, num_centroids=4)",
        "VRQ(codes_per_1000_rows=1000, num_levels=2, num_centroids=16)",
        "LowRank(rank=1)",
        "Hash(num_buckets=64)",
        "OPQ(num_subspaces=2, num_centroids=16)",
        "MGQE()",
        "DropRare(num_kept=64)",
        "QuotientRemainder()",
        "CpRec(first_dim=2)",
        "MixedPrecision(bits_per_64_values=64)",
        "Pruned(kept_per_mille=1)",
        "CAFE()",
        "CCE()",
        "LMA()",
    ],
)
def test_peak_memory_of_a_fit_does_not_grow_with_the_table(method):
    more_rows = 600_000
    growth = peak_of_fit(method, 200_000 + more_rows) - peak_of_fit(method, 200_000)
    # One copy of the rows more would be 146 MiB; a few numbers per row (weights, their running sum) are allowed.
    assert growth < more_rows * 64 + 8 * MIB
