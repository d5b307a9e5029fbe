"""Evaluation: benchmarks behind one contract, and readers of the official file layouts. Imports nothing by itself."""
