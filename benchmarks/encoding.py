"""Encode 2,000 pictures with an open_clip checkpoint, kill the process, and resume.

Run ``python benchmarks/encoding.py``. It makes the pictures and a checkpoint of random weights
(ViT-S-32, 63 M parameters, open_clip's smallest plain architecture) and encodes the pictures twice:
without interruption, and with the process killed half-way (SIGKILL) and started again. It checks
that both results are bit-identical, and counts from the log the pictures that were encoded twice.
The result is written to ``benchmarks/results/encoding.json``.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import click
import numpy as np
import open_clip
import torch
from PIL import Image
from safetensors.torch import save_file

ARCHITECTURE = "ViT-S-32"
RESULT = Path(__file__).resolve().parent / "results" / "encoding.json"


@click.command(context_settings={"show_default": True})
@click.option("--pictures", default=2000, help="Number of pictures.")
@click.option("--batch-size", default=32, help="Inputs at a time.")
@click.option("--device", default="cpu", help="Device of the encoder.")
@click.option("--out", type=click.Path(path_type=Path), default=RESULT, help="Result file.")
def main(pictures: int, batch_size: int, device: str, out: Path) -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make_graph(folder, pictures)
        torch.manual_seed(0)
        model = open_clip.create_model(ARCHITECTURE)
        save_file(model.state_dict(), folder / "clip.safetensors")
        command = [sys.executable, "-m", "imvia_graph", "encode", "kg", "--images", "images"]
        command += ["--encoder", f"open_clip:{ARCHITECTURE}/clip.safetensors"]
        command += ["--batch-size", str(batch_size), "--device", device]

        start = time.perf_counter()
        run([*command, "--out", "whole"], folder)
        unbroken = time.perf_counter() - start
        broken_off = [*command, "--out", "again", "--cache", "cache"]
        kept = kill_half_way(broken_off, folder, pictures // batch_size // 2)
        start = time.perf_counter()
        run(broken_off, folder)
        rest = time.perf_counter() - start

        (log,) = (folder / "cache").rglob("log.jsonl")
        events = [json.loads(line) for line in log.read_text().splitlines()]
        started = sum(event["inputs"] for event in events if event["event"] == "start")
        whole, again = (digest(folder / run / "views") for run in ("whole", "again"))
        (report,) = json.loads((folder / "whole" / "encode.json").read_text())
        result = {
            "pictures": pictures,
            "encoder": f"open_clip {ARCHITECTURE}, random weights, checkpoint on disk",
            "batch_size": batch_size,
            "device": device,
            "unbroken_seconds": round(unbroken, 1),
            "pictures_a_second": round(pictures / report["seconds"], 1),
            "killed_after_batches": kept,
            "going_on_seconds": round(rest, 1),
            "encoded_twice": started - pictures,
            "at_most_allowed": batch_size,
            "same_features": whole == again,
            "threads": torch.get_num_threads(),
            "torch": torch.__version__,
            "open_clip": open_clip.__version__,
            "processor": platform.processor() or platform.machine(),
        }
    click.echo(json.dumps(result, indent=2))
    if whole != again or not 0 <= started - pictures <= batch_size:
        raise click.ClickException("The features differ, or pictures were encoded twice.")
    out.write_text(json.dumps(result, indent=2) + "\n")


def make_graph(folder: Path, pictures: int) -> None:
    """Write a ring of entities with four distinct noise pictures of 256 x 192 each."""
    entities = [f"e{i:04}" for i in range(-(-pictures // 4))]
    (folder / "kg").mkdir()
    lines = [f"{one}\tnext\t{entities[i - 1]}\n" for i, one in enumerate(entities)]
    (folder / "kg" / "train.tsv").write_text("".join(lines))
    for i in range(pictures):
        path = folder / "images" / entities[i // 4] / f"{i % 4}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        noise = np.random.default_rng(i).integers(0, 256, (12, 16, 3), dtype=np.uint8)
        Image.fromarray(noise).resize((256, 192)).save(path)


def run(command: list[str], folder: Path) -> None:
    subprocess.run(command, cwd=folder, check=True, env=os.environ)


def kill_half_way(command: list[str], folder: Path, batches: int) -> int:
    """Start the command, kill it after some finished batches, and return the number of batches."""
    process = subprocess.Popen(command, cwd=folder)
    while len(list((folder / "cache").rglob("part-*.safetensors"))) < batches:
        if process.poll() is not None:
            raise click.ClickException("The command ended before it could be killed.")
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.wait()
    return len(list((folder / "cache").rglob("part-*.safetensors")))


def digest(folder: Path) -> str:
    """Return a SHA-256 over the names and contents of the files in a folder."""
    total = hashlib.sha256()
    for path in sorted(folder.iterdir()):
        total.update(path.name.encode() + path.read_bytes())
    return total.hexdigest()


if __name__ == "__main__":
    main()
