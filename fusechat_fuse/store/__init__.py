"""What is on disk: shards of conversations, their rows, files that land whole, the tokenizer beside them."""
