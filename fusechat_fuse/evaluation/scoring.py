"""Scores of answers to held-out prompts: exact match with the data's own answer, or a function of the user's.

Files of answers are those of `answer --benchmark held_out`, one for each model.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Sequence
from numbers import Real
from pathlib import Path
from typing import Any

import numpy as np

from fusechat_fuse.errors import InputError, describe_error
from fusechat_fuse.user_code import load_function

logger = logging.getLogger(__name__)
EXACT_MATCH = "exact_match"
_WHAT = "score for compare"


def exact_match(answer: str, reference: str, row: dict[str, Any]) -> bool:
    """Whether the answer is the data's own, white space at both ends aside."""
    return answer.strip() == reference.strip()


def score_name(score: str) -> str:
    """How tables and sentences call a score."""
    return "exact match" if score == EXACT_MATCH else f"score by {score.rpartition(':')[2]}"


def score_answers(score: str, files: Sequence, names: Sequence[str]) -> tuple[list[str], np.ndarray]:
    """The scores of several models' answers to the same prompts.

    Args:
        score: exact_match, or FILE.py:function of (answer, reference, row), which returns a number from 0 to 1 or
            whether the answer is right; reference: the data's answer, row: as `questions` describes it.
        files: of answers [M]. names: of the models [M].
    Returns: ids of the conversations that all files have [N]; scores [M, N].
    Raises: InputError that names the conversation whose score is no such number.
    """
    function = exact_match if score == EXACT_MATCH else load_function(_WHAT, score)
    rows = [_read(Path(file)) for file in files]
    ids = [name for name in rows[0] if all(name in of for of in rows)]
    if not ids:
        raise InputError(f"answers for compare: expected some to the same prompts, got none in {files[0]}.")
    if left_out := len(set().union(*rows)) - len(ids):
        logger.warning("%d conversations have no score: not every model has answered them.", left_out)
    values = [
        [_score(function, of[name], f"score of conversation {name} (answer of {model}) by {score}") for name in ids]
        for of, model in zip(rows, names, strict=True)
    ]
    return ids, np.array(values)


def _read(file: Path) -> dict[str, dict[str, Any]]:
    """The rows of a file of answers, by id."""
    try:
        rows = [json.loads(line) for line in file.read_text(encoding="utf-8").split("\n") if line]
        return {row["id"]: row for row in rows if isinstance(row["data_answer"], str) and row["messages"]}
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise InputError(
            f"answers for {file}: expected what answer --benchmark held_out writes, got {describe_error(error)}. "
            "Give that file."
        ) from error


def _score(function: Callable[[str, str, dict], Any], row: dict[str, Any], what: str) -> float:
    try:
        value = function(row["messages"][-1]["content"], row["data_answer"], row)
    except Exception as error:  # the user's code may raise anything
        raise InputError(f"{what}: expected a number from 0 to 1, got {describe_error(error)}. Correct it.") from error
    if not isinstance(value, Real | np.bool_) or not 0 <= float(value) <= 1:
        raise InputError(f"{what}: expected a number from 0 to 1, got {value!r:.80}. Correct it.")
    return float(value)
