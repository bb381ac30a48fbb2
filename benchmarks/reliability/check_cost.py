"""Measure the cost of checking each training step for NaN and infinity.

    IMVIA_DATA=… OMP_NUM_THREADS=1 python benchmarks/reliability/check_cost.py countries MKG-Y

The parts of a step that only the check needs (copies of random states and buffers, a sum of each
gradient, and reading these sums) are timed during training, in processor time of this thread. MKG-Y
gets random features as image and text views.
"""

import argparse
import contextlib
import time
from collections.abc import Callable
from statistics import median
from typing import Any

import torch
from common import about, commit, write_results

import imvia_graph as ig
from imvia_graph import _guards


class Clock:
    """Seconds spent in wrapped functions, by step."""

    def __init__(self) -> None:
        self.now, self.steps = 0.0, []

    def around(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*arguments: Any, **options: Any) -> Any:
            began = time.thread_time()
            try:
                return function(*arguments, **options)
            finally:
                self.now += time.thread_time() - began

        return timed


CLOCK = Clock()
for part, method in (
    (_guards.Before, "__init__"),
    (_guards.Health, "of"),
    (_guards.Health, "problems"),
):
    setattr(part, method, CLOCK.around(getattr(part, method)))


class Steps(ig.Callback):
    """Seconds of each step."""

    def __init__(self, clock: Clock, most: int) -> None:
        self.clock, self.most, self.seconds = clock, most, []
        self.began = 0.0

    def on_step(self, trainer: ig.Trainer, losses: dict[str, Any]) -> None:
        now = time.thread_time()
        if self.began:
            self.seconds.append(now - self.began)
            self.clock.steps.append(self.clock.now)
        if len(self.seconds) == self.most:
            raise StopIteration
        self.clock.now = 0.0
        self.began = time.thread_time()


def measure(name: str, steps: int) -> dict[str, Any]:
    kg = ig.load_kg(name)
    if not kg.modalities:
        generator = torch.Generator().manual_seed(0)
        for modality, width in (("image", 512), ("text", 384)):
            feat = torch.randn(kg.num_entities, width, generator=generator)
            kg = ig.io.with_views(kg, {modality: feat})
    watched = Steps(CLOCK, steps)
    CLOCK.steps = []
    with contextlib.suppress(StopIteration):
        ig.fit(kg, epochs=1000, device="cpu", seed=0, validate_every=1000, callbacks=[watched])
    # The first steps compile kernels and allocate memory.
    seconds, checked = watched.seconds[10:], CLOCK.steps[10:]
    return {
        "steps": len(seconds),
        "step_ms": round(1e3 * median(seconds), 3),
        "check_ms": round(1e3 * median(checked), 3),
        "share": round(sum(checked) / sum(seconds), 5),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("data", nargs="*", default=["countries", "MKG-Y"])
    parser.add_argument("--steps", type=int, default=110)
    options = parser.parse_args()
    torch.set_num_threads(1)
    rows = {}
    for name in options.data:
        rows[name] = measure(name, options.steps)
        print(name, rows[name], flush=True)
    write_results("check-cost", {**about(), "commit": commit(), "threads": 1, "data": rows})


if __name__ == "__main__":
    main()
