"""Helpers of these scripts: result files, machine description and the command line."""

import json
import os
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

import imvia_graph

RESULTS = Path(__file__).parents[1] / "results"


def about() -> dict[str, Any]:
    """Describe the machine, the versions and the command."""
    return {
        "machine": f"{platform.machine()} CPU, {os.cpu_count()} cores",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "imvia-graph": imvia_graph.__version__,
        "command": " ".join(["python", *sys.argv]),
    }


def commit() -> str:
    """Return the commit of the library, with " and changes" if its files differ from it."""

    def git(*words: str) -> str:
        folder = Path(imvia_graph.__file__).parents[1]
        done = subprocess.run(
            ["git", *words], capture_output=True, text=True, check=False, cwd=folder
        )
        return done.stdout.strip()

    changed = git("status", "--porcelain", "--", "imvia_graph", "cli", "datasets")
    return (git("rev-parse", "--short", "HEAD") or "unknown") + (" and changes" * bool(changed))


def write_results(name: str, values: dict[str, Any]) -> None:
    """Write ``results/reliability-NAME.json`` and print a summary and the path."""
    path = RESULTS / f"reliability-{name}.json"
    path.write_text(json.dumps(values, indent=1) + "\n", encoding="utf-8")
    shown = {key: value for key, value in values.items() if not isinstance(value, list | dict)}
    print(json.dumps(shown, indent=1))
    print(f"Written: {path}")


def command(*arguments: str) -> list[str]:
    """Return the arguments that run the command line in another process."""
    return [sys.executable, "-m", "imvia_graph", *arguments]


def quiet_run(*arguments: str, **options: Any) -> subprocess.CompletedProcess[str]:
    """Run the command line in another process and wait for its end."""
    return subprocess.run(
        command(*arguments), capture_output=True, text=True, check=False, **options
    )
