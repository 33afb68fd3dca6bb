"""A whole fusion from one recipe: its stages as subprocesses, what they cost, and the report."""
