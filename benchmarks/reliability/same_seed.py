"""Check that two runs with the same seed on the same machine are bitwise equal.

    IMVIA_DATA=… OMP_NUM_THREADS=1 python benchmarks/reliability/same_seed.py
    python benchmarks/reliability/same_seed.py --data countries --threads 2

For each data set, two processes train a model of small width; MKG-Y, MKG-W and DB15K get random
features as image and text views. The weights, the losses and validation metrics of the epochs, and
the test metrics are compared.
"""

import argparse
import hashlib
import json
import os
import subprocess
import sys
import time
from typing import Any

from common import about, write_results

DATA = ("countries", "MKG-Y", "MKG-W", "DB15K")
SETTINGS = {"dim": 32, "relation_dim": 16, "information_dim": 16, "device": "cpu", "seed": 7}


def train(name: str, epochs: int, threads: int) -> None:
    """Train, and print the metrics and a digest of the weights."""
    import torch

    import imvia_graph as ig

    torch.set_num_threads(threads)
    kg = ig.load_kg(name)
    if not kg.modalities:
        generator = torch.Generator().manual_seed(0)
        for modality, width in (("image", 32), ("text", 24)):
            feat = torch.randn(kg.num_entities, width, generator=generator)
            kg = ig.io.with_views(kg, {modality: feat})
    records: list[dict[str, Any]] = []

    class Keep(ig.Callback):
        def on_epoch(self, trainer: ig.Trainer, record: dict[str, Any]) -> None:
            records.append({key: value for key, value in record.items() if key != "seconds"})

    run = ig.fit(kg, epochs=epochs, callbacks=[Keep()], **SETTINGS)
    weights = hashlib.sha256()
    for key, value in sorted(run.model.state_dict().items()):
        weights.update(key.encode() + value.numpy().tobytes())
    found = {"epochs": records, "test": run.evaluate("test"), "weights": weights.hexdigest()}
    print(json.dumps(found, sort_keys=True))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", nargs="*", default=DATA)
    parser.add_argument("--epochs", type=int, default=1)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--train", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.train:
        train(options.train, options.epochs, options.threads)
        return
    command = [sys.executable, __file__, "--epochs", str(options.epochs)]
    command += ["--threads", str(options.threads), "--train"]
    rows = {}
    for name in options.data:
        began = time.monotonic()
        outputs = [
            subprocess.run([*command, name], capture_output=True, text=True, check=True).stdout
            for _ in range(2)
        ]
        test = json.loads(outputs[0])["test"]["both"]["mrr"]
        rows[name] = {
            "the_same_to_the_bit": outputs[0] == outputs[1],
            "test_mrr": test,
            "seconds": round(time.monotonic() - began),
        }
        print(name, rows[name], flush=True)
    write_results(
        "same-seed",
        {
            **about(),
            "settings": SETTINGS,
            "epochs": options.epochs,
            "threads": options.threads,
            "data": rows,
            "met": all(row["the_same_to_the_bit"] for row in rows.values()),
        },
    )


if __name__ == "__main__":
    main()
