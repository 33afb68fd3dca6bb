"""The `inspect` command: figures of a store directory, and one conversation token by token."""
