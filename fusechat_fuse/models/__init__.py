"""Models: their files and tokenizers, loading, which model is which, and what follows the output layer."""
