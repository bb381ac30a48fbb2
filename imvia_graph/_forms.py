"""Names of the forms that graphs are read from and written in; imports no reader."""

#: Forms that are folders of several files, and forms that are tables of triples.
FOLDERS = ("kg", "openke", "momok", "mygo")
TABLES = ("tsv", "csv", "text", "parquet")
FORMATS = (*FOLDERS, *TABLES, "ntriples", "turtle", "npz")
