"""A networkx graph in, predictions out.

The graph is a `networkx.MultiDiGraph` of anything; the graph of countries stands in for yours. The
predictions are added to it as edges with a score.

    python examples/networkx_predictions.py
"""

import click
import networkx as nx

import imvia_graph as ig


def your_graph() -> nx.MultiDiGraph:
    """Return countries, languages, currencies, …: one edge per fact, the relation as attribute."""
    countries = ig.load_kg("countries")
    graph = nx.MultiDiGraph(name="mine")
    for head, relation, tail in countries.train.tolist():
        graph.add_edge(
            countries.entities[head],
            countries.entities[tail],
            relation=countries.relations[relation],
        )
    return graph


@click.command()
@click.option("--epochs", default=30, show_default=True)
def main(epochs: int) -> None:
    """Train on the graph, predict borders, and add the answers to the graph."""
    graph = your_graph()
    kg = ig.load_kg(graph)  # split 80/10/10 by a seed
    print(repr(kg))
    run = ig.fit(kg, epochs=epochs, dim=128)
    print(f"test MRR: {run.evaluate('test')['both']['mrr']:.1%}")
    for country in ("France", "Brazil", "Kenya"):
        for answer in run.predict(head=country, relation="borders", k=3):
            graph.add_edge(country, answer.entity, relation="borders", score=answer.score)
            print(f"{country} borders {answer.entity}?  {answer.score:.1f}")
    predicted = [edge for edge in graph.edges(data=True) if "score" in edge[2]]
    print(f"{len(predicted)} edges added to {graph}")


if __name__ == "__main__":
    main()
