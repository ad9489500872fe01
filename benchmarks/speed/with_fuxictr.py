"""FuxiCTR's side of the comparisons, to be run by the Python of an environment that holds it (`fuxictr==2.3.10 torch==2.13.0 polars<2 ray`).

`prepare.py` and `train.py` call it with one JSON argument and read one JSON line from its output. The wheel holds layers, base classes and loaders;
its DeepFM is built from them here as the project's own model zoo builds it.
"""

from __future__ import annotations

import json
import logging
import os
import sys
import time
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

from processes import processor_seconds


def main() -> None:
    """Do the job of the first argument."""
    job = json.loads(sys.argv[1])
    logging.basicConfig(level=logging.WARNING)
    result = {"prepare": prepare, "train": train}[job.pop("job")](**job)
    versions = {name: metadata.version(name) for name in ("fuxictr", "torch", "polars", "ray", "numpy")}
    print(json.dumps({**result, "versions": versions}), flush=True)


def prepare(folder: str, numbers: list[str], texts: list[str], block_rows: int, separator: str) -> dict[str, Any]:
    """Seconds for `folder/{train,valid,test}.csv` to become ids, by the project's own Criteo settings: numbers in log buckets."""
    from fuxictr.datasets.criteo import CustomizedFeatureProcessor
    from fuxictr.preprocess import build_dataset

    number = {"active": True, "dtype": "float", "type": "categorical", "preprocess": "convert_to_bucket", "fill_na": 0}
    text = {"active": True, "dtype": "str", "type": "categorical"}
    columns = [{"name": numbers, **number}] if numbers else []
    processor_columns = [*columns, {"name": texts, **text}]
    files = {f"{split}_data": str(Path(folder) / f"{split}.csv") for split in ("train", "valid", "test")}
    start = time.perf_counter()
    processor = CustomizedFeatureProcessor(processor_columns, {"name": "label", "dtype": "float"}, dataset_id="prepared", data_root=folder)
    build_dataset(processor, **files, data_block_size=block_rows, sep=separator)
    return {"seconds": time.perf_counter() - start}


def train(folder: str, sizes: dict[str, int], embedding_dim: int, hidden_units: list[int], batch_size: int) -> dict[str, Any]:
    """Seconds of the second and last epoch on `folder/train.parquet`, which holds ids: the first warms up."""
    import torch
    from fuxictr.features import FeatureMap
    from fuxictr.pytorch.dataloaders import RankDataLoader
    from fuxictr.pytorch.layers import FactorizationMachine, FeatureEmbedding, MLP_Block
    from fuxictr.pytorch.models import BaseModel

    class DeepFM(BaseModel):
        """As in the project's model zoo."""

        def __init__(self, feature_map: FeatureMap, **settings: Any) -> None:
            super().__init__(feature_map, **settings)
            self.embedding_layer = FeatureEmbedding(feature_map, embedding_dim)
            self.fm = FactorizationMachine(feature_map)
            self.mlp = MLP_Block(input_dim=feature_map.sum_emb_out_dim(), output_dim=1, hidden_units=hidden_units, hidden_activations="ReLU")
            self.compile("adam", "binary_crossentropy", 1e-3)
            self.reset_parameters()
            self.model_to_device()

        def forward(self, inputs: Any) -> dict[str, Any]:
            features = self.get_inputs(inputs)
            vectors = self.embedding_layer(features)
            return {"y_pred": self.output_activation(self.fm(features, vectors) + self.mlp(vectors.flatten(start_dim=1)))}

    torch.manual_seed(0)
    feature_map = FeatureMap("log", folder)
    feature_map.labels = ["label"]
    feature_map.default_emb_dim = embedding_dim
    for name, size in sizes.items():
        feature_map.features[name] = {"source": "", "type": "categorical", "padding_idx": 0, "vocab_size": size}
    feature_map.num_fields = feature_map.get_num_fields()
    feature_map.set_column_index()
    data = str(Path(folder) / "train.parquet")
    loader, _ = RankDataLoader(feature_map, stage="train", train_data=data, batch_size=batch_size, shuffle=True, data_format="parquet")
    model = DeepFM(feature_map, verbose=0, model_root=folder, metrics=["AUC"])
    model._max_gradient_norm, model._eval_steps, model._total_steps, model._stop_training = 10.0, 10**9, 0, False
    return epochs(lambda: model.train_epoch(loader), loader.num_samples)


def epochs(epoch: Callable[[], Any], rows: int) -> dict[str, Any]:
    """Samples per second of the second of two epochs, loader included, by the clock and by the processor time of all processes."""
    for _ in range(2):
        start, used = time.perf_counter(), processor_seconds(os.getpid())
        epoch()
        seconds, used = time.perf_counter() - start, processor_seconds(os.getpid()) - used
    return {"samples_per_second": rows / seconds, "samples_per_processor_second": rows / used}


if __name__ == "__main__":
    main()
