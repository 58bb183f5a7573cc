"""Every method side by side: a grid of cells, each one pass over the model, and a table of what came of them."""
