"""The report of a run: one JSON document for machines, one HTML page for people."""
