"""Run `fit` and `encode` on a disk that fills up: a small tmpfs, which needs root.

    sudo python benchmarks/reliability/full_disk.py

For disks of growing size, this records the message and exit code of each command, and whether the
run folder can still be loaded. Then the disk is enlarged and the command is resumed to its end.
"""

import json
import subprocess
import tempfile
from pathlib import Path
from typing import Any

from common import about, quiet_run, write_results
from kill import make_graph, make_raw

import imvia_graph as ig

FIT = {"dim": 64, "relation_dim": 16, "information_dim": 16, "batch_size": 128, "epochs": 4}
#: Sizes of the disk in KiB, for training and for encoding.
FIT_SIZES, ENCODE_SIZES = (64, 1024, 2048, 4096), (128, 512, 1024)


def mount(folder: Path, size: int, how: str = "") -> None:
    options = f"size={size}k{how}"
    subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)], check=True)


def unmount(folder: Path) -> None:
    # Lazily, because files of a run may still be memory-mapped.
    subprocess.run(["umount", "--lazy", str(folder)], check=True)


def last_line(done: subprocess.CompletedProcess[str]) -> str:
    return (done.stderr.strip().splitlines() or [""])[-1]


def whole_run(folder: Path) -> bool:
    """Return whether the run can be loaded or has no checkpoint yet."""
    if not (folder / "run.json").is_file():
        return True
    try:
        ig.load(folder, "cpu")
    except ig.CheckpointError as error:
        return "has not reached its first checkpoint" in str(error)
    return True


def fit(top: Path, disk: Path, size: int, disk_full: str) -> dict[str, Any]:
    make_graph(top)
    mount(disk, size)
    out = disk / "run"
    settings = [f"--set={key}={value}" for key, value in {**FIT, "disk_full": disk_full}.items()]
    try:
        first = quiet_run("fit", str(top / "graph"), "--out", str(out), *settings)
        whole = whole_run(out)
        kept = (out / "run.json").is_file()
        mount_again = ["mount", "-o", "remount,size=64m", str(disk)]
        subprocess.run(mount_again, check=True)
        arguments = ["--resume"] if kept else [str(top / "graph"), *settings]
        second = quiet_run("fit", "--out", str(out), *arguments)
        lines = (out / "metrics.jsonl").read_text().splitlines()
        epochs = [json.loads(line)["epoch"] for line in lines]
    finally:
        unmount(disk)
    return {
        "size_kib": size,
        "disk_full": disk_full,
        "exit_code": first.returncode,
        "said": last_line(first),
        "whole": whole,
        "then_exit_code": second.returncode,
        "then_epochs": epochs,
        "met": whole
        and "Traceback" not in first.stderr
        and first.returncode in (0, 1)
        and second.returncode == 0
        and epochs == list(range(1, FIT["epochs"] + 1)),
    }


def encode(top: Path, disk: Path, size: int) -> dict[str, Any]:
    mount(disk, size)
    arguments = ["encode", str(top / "facts.tsv"), "--split", "none", "--out", str(disk / "kg")]
    arguments += ["--texts", str(top / "texts.tsv"), "--text-encoder", "minilm"]
    arguments += ["--images", str(top / "images"), "--image-encoder", "efficientnet-lite0"]
    arguments += ["--batch-size", "8", "--device", "cpu"]
    try:
        first = quiet_run(*arguments)
        subprocess.run(["mount", "-o", "remount,size=64m", str(disk)], check=True)
        again = ["--overwrite"] if (disk / "kg" / "kg.json").exists() else []
        second = quiet_run(*arguments, *again)
        reports = json.loads((disk / "kg" / "encode.json").read_text())
        views = sum(report["views"] for report in reports)
    finally:
        unmount(disk)
    return {
        "size_kib": size,
        "exit_code": first.returncode,
        "said": last_line(first),
        "then_exit_code": second.returncode,
        "then_views": views,
        "then_reused": sum(report["reused"] for report in reports),
        "met": "Traceback" not in first.stderr
        and first.returncode == 1
        and second.returncode == 0
        and views == 240,
    }


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        top, disk = Path(folder) / "top", Path(folder) / "disk"
        top.mkdir()
        disk.mkdir()
        make_raw(top)
        fits = [fit(top, disk, size, "stop") for size in FIT_SIZES]
        fits.append(fit(top, disk, FIT_SIZES[-2], "continue"))
        encodes = [encode(top, disk, size) for size in ENCODE_SIZES]
    met = all(row["met"] for row in [*fits, *encodes])
    for row in [*fits, *encodes]:
        print(json.dumps(row))
    write_results("full-disk", {**about(), "fit": fits, "encode": encodes, "met": met})


if __name__ == "__main__":
    main()
