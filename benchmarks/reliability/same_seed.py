"""The same seed on the same machine, twice: are metrics and weights the same to the last bit?

    IMVIA_DATA=… OMP_NUM_THREADS=1 python benchmarks/reliability/same_seed.py
    python benchmarks/reliability/same_seed.py --data countries --threads 2

Each data set is trained on twice, in two processes; MKG-Y, MKG-W and DB15K with made-up features of
pictures and texts, and small widths. Compared are the weights, the epochs' losses and validation
metrics, and the test metrics.
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
    """Train and print a digest of everything that could differ."""
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
        said = [
            subprocess.run([*command, name], capture_output=True, text=True, check=True).stdout
            for _ in range(2)
        ]
        test = json.loads(said[0])["test"]["both"]["mrr"]
        rows[name] = {
            "the_same_to_the_bit": said[0] == said[1],
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
