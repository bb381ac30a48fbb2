"""The forms that a graph is read from and written in, by name: said without importing a reader."""

#: Folders of several files, and tables of triples.
FOLDERS = ("kg", "openke", "momok", "mygo")
TABLES = ("tsv", "csv", "text", "parquet")
FORMATS = (*FOLDERS, *TABLES, "ntriples", "turtle", "npz")
