"""Fuzz every reader: each input must give a value or an `IMVIAError`, within resource limits.

    python benchmarks/reliability/fuzz.py            # 237,000 inputs
    python benchmarks/reliability/fuzz.py --share 0.01 --only kg-folder turtle
    python benchmarks/reliability/fuzz.py --only turtle --update     # keeps the other rows

hypothesis draws a valid file of the reader's format and up to six changes to it: bytes inserted,
removed, overwritten or repeated, bits flipped, the rest cut off. Inserted bytes include keywords of
the format and wrong sizes. The readers run in another process, so that a crash is noticed. An input
fails if reading it has any other outcome, takes more than 5 s of processor time or a minute of
wall-clock time, makes the process grow by more than 1 GiB, or opens a file outside the folder for
writing. If compiled code hangs and no signal gets through, the process is ended after two minutes.
Each row of the results names the commit that was tested.
"""

import argparse
import contextlib
import faulthandler
import gzip
import io
import json
import multiprocessing
import os
import pickle
import resource
import shutil
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np
import polars as pl
import torch
from common import RESULTS, about, commit, write_results
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st
from safetensors.torch import save as tensor_bytes

import imvia_graph as ig
from imvia_graph import Settings, checkpoint
from imvia_graph.encode.parts import Parts
from imvia_graph.encode.pictures import BrokenPicture, open_picture
from imvia_graph.export import read_queries
from imvia_graph.io.views import read_images, read_texts
from imvia_graph.tuning import check_space, read_space

SECONDS, WAITING, HUNG, MEMORY = 5, 60, 120, 2**30
ENTITIES = [f"e{i}" for i in range(6)]
#: Inserted into any file: invalid sizes, delimiters, escapes, paths, multi-byte characters.
WORDS = [
    *(b"\0", b"\n", b"\r\n", b"\t", b" ", b",", b'"', b"\\", b"\xff", b"\xef\xbb\xbf", b"\x1b[2J"),
    *(b"1000000000000", b"-1", b"9" * 30, b"9" * 5000, b"1e999", b"nan", "²".encode(), b"0x10"),
    *(b"../../etc/passwd", b"/etc/passwd", b"e1", b"\xed\xa0\x80", "é".encode(), b"<script>"),
    *(b"\xff\xff\xff\xff\xff\xff\xff\x7f", b"\0\0\0\0\0\0\0\x80", b"[" * 2000, b"{" * 2000),
]


class Reader(NamedTuple):
    """A reader under test.

    ``seeds`` holds valid contents by file, of which one file is changed; ``around`` holds the
    unchanged files of the folder, ``words`` the keywords of the format.
    """

    inputs: int
    seeds: dict[str, list[bytes]]
    read: Callable[[Path], Any]
    words: Sequence[bytes] = ()
    around: Mapping[str, bytes] = MappingProxyType({})


# -- inputs ---------------------------------------------------------------------------------------


def changed(content: bytes, changes: list[tuple[int, int, bytes]]) -> bytes:
    for place, kind, word in changes:
        at = place % (len(content) + 1)
        length = len(word)
        if kind == 0:
            content = content[:at] + word + content[at:]
        elif kind == 1:
            content = content[:at] + word + content[at + length :]
        elif kind == 2:
            content = content[:at] + content[at + 1 + length :]
        elif kind == 3:
            content = content[:at]
        elif kind == 4:
            content = content[:at] + content[at : at + 40] * 3 + content[at + 40 :]
        elif kind == 5 and content:
            at %= len(content)
            bit = 1 << place % 8
            content = content[:at] + bytes([content[at] ^ bit]) + content[at + 1 :]
        elif kind == 6:
            content = content + word
        else:
            content = word + content
    return content


def inputs(reader: Reader) -> st.SearchStrategy[tuple[str, bytes]]:
    word = st.one_of(st.sampled_from([*WORDS, *reader.words]), st.binary(max_size=6))
    changes = st.lists(st.tuples(st.integers(0, 2**16), st.integers(0, 7), word), max_size=6)
    files = [(name, content) for name, seeds in reader.seeds.items() for content in seeds]
    return st.tuples(st.sampled_from(files), changes).map(
        lambda drawn: (drawn[0][0], changed(drawn[0][1], drawn[1]))
    )


# -- readers --------------------------------------------------------------------------------------


def saved(write: Callable[[io.BytesIO], Any]) -> bytes:
    file = io.BytesIO()
    write(file)
    return file.getvalue()


def folder_bytes(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def small_kg() -> ig.MultiViewKG:
    triples = torch.tensor([[i, i % 2, (i + 1) % 6] for i in range(6)])
    generator = torch.Generator().manual_seed(0)
    views = {
        "image": ig.Views(
            torch.randn(5, 3, generator=generator), torch.tensor([0, 0, 1, 3, 4]), root="/tmp"
        ),
        "text": ig.Views(torch.randn(6, 2, generator=generator), torch.arange(6)),
    }
    return ig.MultiViewKG(
        ENTITIES, ["r", "s"], triples[:4], triples[4:5], triples[5:], views, name="small"
    )


def load(name: str, **options: Any) -> Callable[[Path], Any]:
    return lambda folder: ig.load_kg(folder / name, "published", **options)


def features(name: str) -> Callable[[Path], Any]:
    return lambda folder: ig.io.read_features(folder / name, ENTITIES)


def picture(folder: Path) -> None:
    with contextlib.suppress(BrokenPicture):  # `encode` reports and skips these
        open_picture((folder / "picture").read_bytes())


def resumed(kg: ig.MultiViewKG, chosen: Settings) -> Callable[[Path], Any]:
    def read(folder: Path) -> None:
        trainer = ig.Trainer(ig.IMVIA.from_kg(kg, chosen), kg, chosen)
        checkpoint.load_last(folder, trainer)

    return read


def parts(folder: Path) -> None:
    there = Parts(folder, "e", "i")
    there.folder = folder / "parts"
    there.read()


def part_bytes() -> bytes:
    with tempfile.TemporaryDirectory() as top:
        there = Parts(Path(top), "e", "i")
        there.write([bytes(32), bytes([1]) * 32], torch.rand(2, 3), {bytes([2]) * 32: "broken"})
        return next(there.folder.glob("part-*")).read_bytes()


def pictures() -> list[bytes]:
    from PIL import Image

    image = Image.fromarray(np.arange(192, dtype=np.uint8).reshape(8, 8, 3))
    kinds = ["PNG", "JPEG", "GIF", "WEBP", "BMP", "TIFF", "PPM", "ICO", "TGA"]
    return [saved(lambda file, kind=kind: image.save(file, kind)) for kind in kinds]


def zipped(content: bytes) -> list[bytes]:
    if sys.version_info >= (3, 14):
        from compression import zstd
    else:
        from backports import zstd
    return [gzip.compress(content), zstd.compress(content)]


def readers(top: Path) -> dict[str, Reader]:
    kg = small_kg()
    tiny = {"dim": 4, "relation_dim": 4, "information_dim": 4, "batch_size": 8, "epochs": 2}
    run = folder_bytes(ig.fit(kg, out=top / "a-run", device="cpu", **tiny).folder)
    chosen = ig.load(top / "a-run", "cpu").settings
    layouts = {}
    for form in ("kg", "openke", "momok", "mygo"):
        ig.io.write_kg(kg, top / form, form)
        layouts[form] = folder_bytes(top / form)
    tsv = b"e1\tr\te2\ne2\ts\te3\n\ne3\tr\te1\n"
    csv = b'head,relation,tail\ne1,r,"e 2"\n"e,2",s,e3\n'
    spaced = b"e1 r e2 .\ne2  s\te3\n"
    triples = pl.DataFrame({"head": ["e1", "e2"], "relation": ["r", "s"], "tail": ["e2", "e3"]})
    feat = np.arange(18, dtype=np.float32).reshape(6, 3)
    tensor = torch.from_numpy(feat)
    yaml = b"dim: 8\nmodalities: [image, text]\nlearning_rate: 1e-3\npatience: null\n"
    toml = b'dim = 8\nmodalities = ["image"]\nlearning_rate = 1e-3\n[a]\nb = 1979-05-27\n'
    yaml_words = [b"&a ", b"*a", b"!!python/object:os.system", b"? ", b": ", b"- ", b"<<: ", b"|"]
    yaml_words += [b"!!float ", b"2024-13-45", b"1:2:3", b"---\n", b"%YAML", b"dim", b"gradient_"]
    turtle = b'@prefix e: <http://e/> .\ne:a e:knows e:b, [ e:of ( 1 "x"@en ) ] ; e:n 4.5 .\n'
    lines = b'<http://e/a> <http://e/r> <http://e/b> .\n_:x <http://e/r> "t"@en . # c\n'
    rdf_words = [b"<", b">", b"_:", b"^^", b'"""', b"@prefix", b"[", b"(", b"\\u12", b"http://"]
    space = b"dim: [4, 8]\nlearning_rate: {low: 0.001, high: 0.01, log: true}\n"
    other = {name: value for name, value in run.items() if not name.startswith("kg/")}
    found = {
        "settings-yaml": Reader(
            30_000, {"s.yaml": [yaml]}, lambda f: Settings.read(f / "s.yaml"), yaml_words
        ),
        "settings-toml": Reader(
            25_000, {"s.toml": [toml]}, lambda f: Settings.read(f / "s.toml"), [b"[[", b"'''", b"="]
        ),
        "set-key-value": Reader(
            25_000,
            {"s": [b"dim=64", b"modalities=[text]", b"learning_rate=1e-3"]},
            lambda f: Settings.create(
                Settings.parse((f / "s").read_bytes().decode("utf-8", "surrogateescape").split())
            ),
            yaml_words,
        ),
        "space": Reader(
            10_000,
            {"s.yaml": [space]},
            lambda f: check_space(read_space(f / "s.yaml"), {}),
            [*yaml_words, b"low", b"high", b"step", b"log"],
        ),
        "tsv": Reader(12_000, {"t.tsv": [tsv]}, load("t.tsv", split=False)),
        "csv": Reader(8_000, {"t.csv": [csv]}, load("t.csv", split=False)),
        "spaces": Reader(6_000, {"t.txt": [spaced, tsv]}, load("t.txt", split=False)),
        "compressed": Reader(6_000, {"t.tsv": zipped(tsv * 20)}, load("t.tsv", split=False)),
        "parquet": Reader(
            6_000,
            {"t.parquet": [saved(triples.write_parquet)]},
            load("t.parquet", split=False),
        ),
        "npz-triples": Reader(
            6_000,
            {
                "t.npz": [
                    saved(lambda file: np.savez(file, train=np.array([[0, 0, 1]]))),
                    saved(lambda file: np.savez_compressed(file, train=[["a", "r", "b"]])),
                ]
            },
            load("t.npz", split=False),
        ),
        "n-triples": Reader(8_000, {"t.nt": [lines]}, load("t.nt", split=False), rdf_words),
        "turtle": Reader(
            8_000, {"t.ttl": [turtle]}, load("t.ttl", split=False, literals="numbers"), rdf_words
        ),
        "kg-folder": Reader(
            10_000,
            {name: [content] for name, content in layouts["kg"].items()},
            lambda f: ig.load_kg(f, "published"),
            [b"entity,source", b'"version": 2', b'"roots": {"image": "/"}', b"\\ud800", b"e5"],
            layouts["kg"],
        ),
        "openke": Reader(
            8_000,
            {name: [content] for name, content in layouts["openke"].items()},
            lambda f: ig.load_kg(f, "published"),
            [],
            layouts["openke"],
        ),
        "momok": Reader(
            4_000,
            {name: [content] for name, content in layouts["momok"].items()},
            lambda f: ig.load_kg(f, "published"),
            [],
            layouts["momok"],
        ),
        "mygo": Reader(
            4_000,
            {name: [content] for name, content in layouts["mygo"].items()},
            lambda f: ig.load_kg(f, "published"),
            [],
            layouts["mygo"],
        ),
        "features-npy": Reader(
            6_000, {"f.npy": [saved(lambda file: np.save(file, feat))]}, features("f.npy")
        ),
        "features-npz": Reader(
            5_000,
            {"f.npz": [saved(lambda file: np.savez(file, feat=feat, entity=ENTITIES))]},
            features("f.npz"),
        ),
        "features-safetensors": Reader(
            5_000, {"f.safetensors": [tensor_bytes({"feat": tensor})]}, features("f.safetensors")
        ),
        "features-pth": Reader(
            6_000,
            {
                "f.pth": [
                    saved(lambda file: torch.save(tensor, file)),
                    saved(lambda file: torch.save({"feat": tensor, "entity": ENTITIES}, file)),
                    saved(
                        lambda file: torch.save(tensor, file, _use_new_zipfile_serialization=False)
                    ),
                    pickle.dumps({"feat": [1.0]}),
                ]
            },
            features("f.pth"),
            [b"cos\nsystem\n", b"R.", b"\x80\x02", b"ctorch\nload\n"],
        ),
        "texts": Reader(
            5_000,
            {"t.tsv": [b"e1\tone\ne2\ttwo\n"], "t.csv": [b'entity,text\ne1,"a\nb"\n']},
            lambda f: read_texts(next(f.glob("t.*")), ENTITIES),
        ),
        "image-tables": Reader(
            4_000,
            {"t.csv": [b"entity,path\ne1,a/1.png\n"]},
            lambda f: read_images(f / "t.csv", ENTITIES),
        ),
        "pictures": Reader(8_000, {"picture": pictures()}, picture),
        "queries": Reader(
            5_000, {"q.tsv": [b"e1\tr\t?\n?\ts\te2\n"]}, lambda f: read_queries(f / "q.tsv", kg)
        ),
        "encoded-parts": Reader(5_000, {"parts/part-0.safetensors": [part_bytes()]}, parts),
        "checkpoints": Reader(
            3_000,
            {name: [run[name]] for name in ("last.safetensors", "previous.safetensors")},
            resumed(kg, chosen),
            [b'\\"epoch\\": ', b"model/", b"random/"],
            {name: run[name] for name in ("last.safetensors", "previous.safetensors")},
        ),
        "run-folders": Reader(
            3_000,
            {name: [content] for name, content in other.items()},
            lambda f: ig.load(f, "cpu"),
            [b"dim: 100000000\n", b"information_dim: 9999999\n", b'"version": 99'],
            run,
        ),
    }
    with contextlib.suppress(ImportError):
        import h5py

        def write(file: io.BytesIO, **options: Any) -> None:
            with h5py.File(file, "w") as opened:
                opened["feat"] = feat
                text = h5py.string_dtype()
                opened.create_dataset("entity", data=ENTITIES, dtype=text, **options)

        contents = [
            saved(write),
            saved(lambda file: write(file, chunks=(4,))),
            saved(lambda file: write(file, chunks=(4,), compression="gzip")),
        ]
        words = [b"GCOL", b"TREE", b"SNOD", b"OHDR"]
        found["features-hdf5"] = Reader(6_000, {"f.h5": contents}, features("f.h5"), words)
    return found


# -- the readers in another process ---------------------------------------------------------------


class TooSlow(BaseException):
    pass


def high_water() -> int:
    """Return the peak resident set size of this process in bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def fuzz_all(names: list[str], share: float, number: int, sender: Any) -> None:
    warnings.simplefilter("ignore")
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # messages of libraries about broken files
    with tempfile.TemporaryDirectory() as top:
        os.environ["XDG_STATE_HOME"] = top  # holds the key that signs KG folders
        found = readers(Path(top))
        for name in names or list(found):
            sender.send(name)
            began = time.monotonic()
            row = fuzz(found[name], share, number)
            sender.send((name, {**row, "seconds": round(time.monotonic() - began)}))
    sender.send(None)


#: State of the audit hook below. A hook cannot be removed, so all readers share one.
WATCHED: dict[str, Any] = {"folder": None, "outside": set()}


def audit(event: str, arguments: tuple[Any, ...]) -> None:
    folder = WATCHED["folder"]
    if folder is None or event != "open" or not isinstance(arguments[0], str | bytes):
        return
    writes = (arguments[2] or 0) & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
    path = os.path.abspath(os.fsdecode(arguments[0]))
    if writes and not path.startswith((folder, "/dev/")):
        WATCHED["outside"].add(path)


sys.addaudithook(audit)


def fuzz(reader: Reader, share: float, number: int) -> dict[str, Any]:
    top = Path(tempfile.mkdtemp())
    folder = top / "box" / "folder"
    folder.mkdir(parents=True)
    os.chdir(folder)
    for path, content in reader.around.items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_bytes(content)
    for path in reader.seeds:
        (folder / path).parent.mkdir(parents=True, exist_ok=True)

    def too_slow(number: int, frame: Any) -> None:
        raise TooSlow

    signal.signal(signal.SIGALRM, too_slow)
    signal.signal(signal.SIGPROF, too_slow)
    failures: dict[str, str] = {}
    counts = {"inputs": 0, "values": 0, "errors": 0, "slowest": 0.0}
    for path, contents in reader.seeds.items():  # read a valid file first: imports are slow
        (folder / path).write_bytes(contents[0])
    with contextlib.suppress(ig.IMVIAError):
        reader.read(folder)
    start = high_water()

    def fail(what: str, content: bytes) -> None:
        failures.setdefault(what, content[:200].hex())

    @seed(number)
    @settings(
        max_examples=max(1, round(reader.inputs * share)),
        deadline=None,
        database=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(inputs(reader))
    def one(drawn: tuple[str, bytes]) -> None:
        path, content = drawn
        for other, contents in reader.seeds.items():
            if reader.around:
                (folder / other).write_bytes(contents[0])
            elif other != path:
                (folder / other).unlink(missing_ok=True)
        (folder / path).write_bytes(content)
        counts["inputs"] += 1
        began = time.process_time()
        WATCHED["folder"] = str(folder)
        try:
            faulthandler.dump_traceback_later(HUNG, exit=True)
            signal.setitimer(signal.ITIMER_PROF, SECONDS)
            signal.setitimer(signal.ITIMER_REAL, WAITING)
            reader.read(folder)
            counts["values"] += 1
        except ig.IMVIAError:
            counts["errors"] += 1
        except TooSlow:
            fail("too slow", content)
        except BaseException as error:
            last = traceback.extract_tb(error.__traceback__)[-1]
            where = f"{Path(last.filename).name}:{last.lineno}"
            fail(f"{type(error).__name__} at {where}: {str(error)[:200]}", content)
        finally:
            signal.setitimer(signal.ITIMER_PROF, 0)
            signal.setitimer(signal.ITIMER_REAL, 0)
            faulthandler.cancel_dump_traceback_later()
            WATCHED["folder"] = None
        seconds = time.process_time() - began
        counts["slowest"] = max(counts["slowest"], seconds)
        if seconds > SECONDS:
            fail("too slow", content)
        if high_water() - start > MEMORY:
            fail("too much memory", content)

    one()
    if WATCHED["outside"]:
        fail(f"wrote outside: {sorted(WATCHED['outside'])[:5]}", b"")
        WATCHED["outside"].clear()
    extra = [path.name for path in (top / "box").iterdir() if path != folder]
    if extra:
        fail(f"made outside: {extra}", b"")
    os.chdir("/")
    shutil.rmtree(top)
    counts["slowest"] = round(counts["slowest"], 2)
    return {**counts, "grown_mib": round((high_water() - start) / 2**20), "failures": failures}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--share", type=float, default=1.0, help="share of the inputs to run")
    parser.add_argument("--only", nargs="*", help="names of the readers to run")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--update", action="store_true", help="keep the other rows of the results")
    options = parser.parse_args()
    context = multiprocessing.get_context("spawn")
    results: dict[str, Any] = {}
    at = commit()
    left, current = list(options.only or []), None
    while True:
        receiver, sender = context.Pipe(duplex=False)
        work = (left, options.share, options.seed, sender)
        process = context.Process(target=fuzz_all, args=work)
        process.start()
        sender.close()
        with contextlib.suppress(EOFError):
            while (message := receiver.recv()) is not None:
                if isinstance(message, str):
                    current = message
                else:
                    name, row = message
                    results[name] = {"commit": at, **row}
                    print(name, json.dumps(row), flush=True)
        process.join()
        if not process.exitcode:
            break
        # An input crashed the process: record a failure, and continue with the other readers.
        died = {f"the process died of {process.exitcode}": ""}
        results[str(current)] = {"commit": at, "inputs": 0, "failures": died}
        print(current, results[str(current)], flush=True)
        if not left:
            with tempfile.TemporaryDirectory() as top:
                left = list(readers(Path(top)))
        left = [name for name in left if name not in results]
        if not left:
            break
    header = about()
    if options.update:
        before = json.loads((RESULTS / "reliability-fuzz.json").read_text(encoding="utf-8"))
        results = {**before["readers"], **results}
        header["command"] = f"{before['command']}; {header['command']}"
    total = sum(found["inputs"] for found in results.values())
    failed = sum(len(found["failures"]) for found in results.values())
    write_results(
        "fuzz",
        {
            **header,
            "seed": options.seed,
            "inputs": total,
            "failures": failed,
            "slowest_seconds": max(found.get("slowest", 0) for found in results.values()),
            "goal": "200,000 inputs, no failure",
            "met": total >= 200_000 and not failed,
            "readers": results,
        },
    )


if __name__ == "__main__":
    main()
