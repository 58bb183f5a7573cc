"""What surrounds a run: where the output goes, who holds it, how it is published, where logs lie."""
