"""One recipe, one command: the stages as subprocesses, in order, each skipped where it is finished and unchanged."""
