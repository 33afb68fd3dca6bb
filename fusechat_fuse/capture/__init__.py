"""A model and conversations to a representation: its top-k next-token distributions."""
