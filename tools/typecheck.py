"""Run mypy on the library, with cli/ and datasets/ under their import names.

mypy finds modules by their paths, but these two top-level folders are imported as `imvia_graph.cli`
and `imvia_graph.datasets`. Therefore mypy checks a folder of links in the installed layout, and its
messages are mapped back to the paths of the repository.
"""

import re
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
MOVED = ("cli", "datasets")


def link_tree(package: Path) -> None:
    """Make `package` a folder of links to the entries of imvia_graph/ and to the moved folders."""
    shutil.rmtree(package, ignore_errors=True)
    package.mkdir(parents=True)
    entries = [entry for entry in (ROOT / "imvia_graph").iterdir() if entry.name != "__pycache__"]
    for entry in entries + [ROOT / name for name in MOVED]:
        (package / entry.name).symlink_to(entry)


def main() -> int:
    """Run mypy and return its exit status."""
    cache = ROOT / ".mypy_cache"
    link_tree(cache / "tree" / "imvia_graph")
    command = [sys.executable, "-m", "mypy", "--config-file", str(ROOT / "pyproject.toml")]
    command += ["--cache-dir", str(cache), *sys.argv[1:], "-p", "imvia_graph"]
    result = subprocess.run(
        command, cwd=cache / "tree", stdout=subprocess.PIPE, text=True, check=False
    )
    moved = "|".join(MOVED)
    print(re.sub(rf"^imvia_graph/({moved})/", r"\1/", result.stdout, flags=re.MULTILINE), end="")
    return result.returncode


if __name__ == "__main__":
    sys.exit(main())
