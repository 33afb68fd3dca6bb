"""Two representations to one aligned: the source's distributions at the pivot's tokens, in its vocabulary."""
