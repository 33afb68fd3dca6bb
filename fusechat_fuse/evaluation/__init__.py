"""Evaluation: models compared by bits per byte, and a model's answers to benchmarks' questions."""
