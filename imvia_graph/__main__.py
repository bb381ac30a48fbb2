"""``python -m imvia_graph`` is ``imvia-graph``."""

from imvia_graph.cli import main

if __name__ == "__main__":
    main()
