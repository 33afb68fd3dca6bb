"""The one exception for what a user can mend: commands turn it into one line and exit code 2."""


class InputError(ValueError):
    """Bad input, said in one sentence: what, for which file/row/option, what was expected, what to do."""
