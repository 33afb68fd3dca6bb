"""`compare`: which model predicts which slice of the data better, from representations alone, before any training.

    bits per byte of a conversation = sum_p ce_p / (ln 2 * bytes of its predicted tokens)

Bytes, not tokens, so that models with different tokenizers can be compared. A conversation counts if every model
predicted the same text of it; one that a model lacks or truncated elsewhere (`max_length`) is left out and counted.

For sources, the choice by slice that training will make (`store.slices`) is made here already, by byte, from all
conversations that pivot and source have. Of a source that serves no slice, a target would equal plain fine-tuning.
"""

from __future__ import annotations

import io
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from fusechat_fuse.errors import InputError
from fusechat_fuse.evaluation.ranking import Measure, rank
from fusechat_fuse.evaluation.scoring import EXACT_MATCH, score_answers, score_name
from fusechat_fuse.store.card import distinct_names
from fusechat_fuse.store.files import json_bytes, write_atomic
from fusechat_fuse.store.shards import Representation, load_representation
from fusechat_fuse.store.slices import choose_by_slice, name_slices, undecided_lines
from fusechat_fuse.user_code import check_function

logger = logging.getLogger(__name__)
ALL = "all"  # the name of the whole data set among the slices


def compare(
    representation_dirs: Sequence,
    output_dir=None,
    *,
    slice_column: str = "slice",
    slice_pattern: str | None = None,
    baseline: str | Path | None = None,
    source_answers: Sequence | None = None,
    answers: Sequence | None = None,
    score: str | None = None,
) -> dict:
    """Bits per byte of several models on the same conversations, per slice and over all.

    Args:
        representation_dirs: two or more directories that `represent` wrote on the same data, the pivot's first, or
            opened representations.
        output_dir: for `compare.json`, `compare.md` and `compare.png` (with matplotlib); None: nothing is written.
        slice_column, slice_pattern: as `store.slices.name_slices` takes them, for the first representation.
        baseline: of results that were made of one pivot, on held-out data: the directory to whose model the others are
            compared, such as plain fine-tuning's; None: the models are a pivot and its sources.
        source_answers: with a baseline: of each model, what `represent` wrote on the same prompts with the sources'
            answers, by which the models are then ranked: the data's answers may be wrong.
        answers, score: with a baseline: of each model, its file of answers to the same prompts, and the score that
            ranks the models before bits per byte, as `scoring.score_answers` takes them.

    Returns:
        models: their names. conversations, left_out: counts. slices: name -> {conversations, bytes, models: name ->
        {median, mean, wins}, best}, the whole data set under "all". median and mean are bits per byte over
        conversations; wins is the share of conversations in which the model has the fewest (ties: the first model);
        best is the model with the lowest median. With a baseline: ranking, as `ranking.rank` returns it. Else choices:
        for each source, and then for all if there are several: sources: their names, share: of the conversations in
        slices that one of them serves, table: as `store.slices.SliceChoice` has it, in bits per byte, summary: of it,
        in lines.

    Raises: InputError for fewer than two directories, one that holds no representation, or no common conversation.
    """
    opened = _open(representation_dirs)
    _check_held_out(len(opened), baseline, source_answers, answers, score)
    names = _names(opened)
    measured = [_measure(one) for one in opened]
    keys, sizes, bits, left_out = _common(opened, measured)
    own = name_slices(opened[0], column=slice_column, pattern=slice_pattern)
    slice_of = dict(zip(zip(opened[0].ids, opened[0].column("content_hash")), own))
    slices = [slice_of[key] for key in keys]
    table = {}
    for name in [ALL, *sorted(set(slices) - {""})]:
        chosen = np.array([name in (ALL, of) for of in slices])
        table[name] = _figures(names, bits[:, chosen], sizes[chosen])
    result = {"models": names, "conversations": len(slices), "left_out": left_out, "slices": table}
    if baseline is None:
        result["choices"] = _choices(names, measured, slice_of)
    else:
        of_data = Measure("bits per byte" + (" of the data's answers" if source_answers else ""), slices, bits)
        by_id = {name: of for (name, _), of in slice_of.items()}
        more = _more_measures(names, by_id, source_answers, answers, score)
        result["ranking"] = rank(names, [*more, of_data], _number_of(baseline, opened))
    if output_dir is not None:
        write(result, Path(output_dir))
    return result


def _open(representation_dirs: Sequence) -> list[Representation]:
    if isinstance(representation_dirs, str | Path) or len(representation_dirs) < 2:
        raise InputError(
            f"representations for compare: expected at least two directories, got {representation_dirs!r}. "
            "Give the pivot's and a source's."
        )
    places = [Path(one.path if isinstance(one, Representation) else one).resolve() for one in representation_dirs]
    if twice := next((place for place in places if places.count(place) > 1), None):
        raise InputError(
            f"representations for compare: expected each directory once, got {twice} twice. Leave one out."
        )
    opened = [one if isinstance(one, Representation) else load_representation(one) for one in representation_dirs]
    for one in opened:
        if one.manifest["kind"] != "representation":
            raise InputError(
                f"representation for {one.path}: expected what represent wrote, got {one.manifest['kind']} data. "
                "Give the representation it was made from."
            )
    return opened


def _number_of(baseline, opened: list[Representation]) -> int:
    places = [one.path.resolve() for one in opened]
    if Path(baseline).resolve() not in places:
        raise InputError(
            f"baseline for compare: expected one of the compared directories, got {baseline}. Give it among these too."
        )
    return places.index(Path(baseline).resolve())


def _check_held_out(count: int, baseline, source_answers, answers, score: str | None) -> None:
    """Raise InputError for what ranks results and does not fit them."""
    if baseline is None and (source_answers or answers or score):
        raise InputError(
            "baseline for compare: expected one with source_answers, answers or a score, got none. Add it."
        )
    if bool(answers) != bool(score):
        raise InputError("score for compare: expected both answers and a score, got one of them. Add the other.")
    if score and score != EXACT_MATCH:
        check_function("score for compare", score)
    for name, given in (("source_answers", source_answers), ("answers", answers)):
        if given and len(given) != count:
            raise InputError(
                f"{name} for compare: expected one for each of {count} models, got {len(given)}. Give them in the "
                "models' order."
            )


def _more_measures(
    names: list[str], slice_of: dict[str, str], source_answers, answers, score: str | None
) -> list[Measure]:
    """What ranks the results before bits per byte of the data's answers; slice_of: by id of the conversation."""
    found = []
    if score and answers:
        ids, scores = score_answers(score, answers, names)
        found.append(Measure(score_name(score), [slice_of.get(name, "") for name in ids], scores, higher=True))
    if source_answers:
        opened = _open(source_answers)
        if (there := _names(opened)) != names:
            raise InputError(
                f"source_answers for compare: expected those of {', '.join(names)}, got {', '.join(there)}. Give them "
                "in the models' order."
            )
        keys, _, bits, _ = _common(opened, [_measure(one) for one in opened])
        slices = [slice_of.get(name, "") for name, _ in keys]
        found.append(Measure("bits per byte of the sources' answers", slices, bits))
    return found


def _names(opened: list[Representation]) -> list[str]:
    return distinct_names([str((one.manifest.get("model") or {}).get("name") or one.path.name) for one in opened])


class Measured(NamedTuple):
    """A model's bits for one conversation, and the bytes of its predicted tokens."""

    bits: float
    bytes: int


Key = tuple[str, str | None]  # id and content hash of a conversation


def _measure(opened: Representation) -> dict[Key, Measured]:
    found = {}
    for row in opened:
        bits = float(np.sum(row["ce"], dtype=np.float64)) / np.log(2)
        size = int(np.sum(row["end"] - row["start"], dtype=np.int64))
        found[row["id"], row.get("content_hash")] = Measured(bits, size)
    return found


def _common(
    opened: list[Representation], measured: list[dict[Key, Measured]]
) -> tuple[list[Key], np.ndarray, np.ndarray, int]:
    """The conversations of which every model predicted the same text [N], their bytes [N], bits per byte of every model
    [M, N], and how many are left out."""
    everyone = set().union(*measured)
    common = [
        key
        for key, (_, size) in measured[0].items()
        if size and all(key in other and other[key].bytes == size for other in measured)
    ]
    if not common:
        raise InputError(
            f"conversations for {', '.join(str(one.path) for one in opened)}: expected some that all of them have, "
            "got none. Represent the models on the same data."
        )
    if left_out := len(everyone) - len(common):
        logger.warning("%d conversations are left out: not every representation has them with the same text.", left_out)
    sizes = np.array([measured[0][key].bytes for key in common], np.int64)
    return common, sizes, np.array([[of[key].bits for key in common] for of in measured]) / sizes, left_out


def _bits_per_byte(one: Measured | None) -> float:
    return one.bits / one.bytes if one and one.bytes else float("inf")


def _choices(names: list[str], measured: list[dict[Key, Measured]], slice_of: dict[Key, str]) -> list[dict]:
    """The choice by slice between pivot and each source, and between all models if there are several sources."""
    numbers = range(1, len(names))
    found = []
    for sources in [[n] for n in numbers] + ([list(numbers)] if len(numbers) > 1 else []):
        keys = [key for key in measured[0] if any(key in measured[n] for n in sources)]
        if not keys:
            continue
        models = [measured[0], *(measured[n] for n in sources)]
        ces = np.array([[_bits_per_byte(of.get(key)) for key in keys] for of in models])
        own = [slice_of[key] for key in keys]
        choice = choose_by_slice(own, ces)
        share = float(np.mean([choice.of(name) > 0 for name in own]))
        entry = {"sources": [names[n] for n in sources], "share": share, "table": choice.table}
        found.append(entry | {"summary": _choice_lines(**entry)})
    return found


def _choice_lines(sources: list[str], share: float, table: dict[str, dict]) -> list[str]:
    """Which slices a choice gives to its sources, and which of them cannot tell."""
    served = [name for name, entry in table.items() if name and entry["best"] > 0]
    unnamed = table[""]["conversations"] - sum(entry["conversations"] for name, entry in table.items() if name)
    if unnamed and table[""]["best"] > 0:
        served.append("what is in no slice" if len(table) > 1 else "all data")
    what = f"serves {', '.join(served)} ({100 * share:.0f} % of the conversations)"
    if not served:
        what = "serves no slice: training on it by slices would equal plain fine-tuning"
    return [f"{' or '.join(sources)} {what}", *undecided_lines(table)]


def _figures(names: list[str], bits: np.ndarray, sizes: np.ndarray) -> dict:
    """The figures of one slice, from bits per byte [M, N] and bytes [N]."""
    winners = np.bincount(bits.argmin(axis=0), minlength=len(names)) / bits.shape[1]
    medians = np.median(bits, axis=1)
    models = {
        name: {"median": float(medians[m]), "mean": float(bits[m].mean()), "wins": float(winners[m])}
        for m, name in enumerate(names)
    }
    return {
        "conversations": bits.shape[1],
        "bytes": int(sizes.sum()),
        "models": models,
        "best": names[int(medians.argmin())],
    }


def table_lines(result: dict) -> list[str]:
    """The comparison as a Markdown table: median bits per byte and share of wins, the best model in bold.

    Below it what training by slices will take from each source and which slices cannot tell, or the ranking.
    """
    names = result["models"]
    lines = [
        "| bits per byte (wins) | conversations | " + " | ".join(names) + " |",
        "|---|---:|" + "---:|" * len(names),
    ]
    for slice_name, figures in result["slices"].items():
        cells = []
        for name in names:
            of = figures["models"][name]
            cell = f"{of['median']:.3f} ({100 * of['wins']:.0f} %)"
            cells.append(f"**{cell}**" if name == figures["best"] else cell)
        lines.append(f"| {slice_name} | {figures['conversations']} | " + " | ".join(cells) + " |")
    lines.append("")
    for choice in result.get("choices", []):
        first, *undecided = choice["summary"]
        lines += [f"- {first}", *(f"  - {line}" for line in undecided)]
    if ranking := result.get("ranking"):
        lines += [*_ranking_lines(ranking), *ranking["summary"]]
    return lines


def _ranking_lines(ranking: dict) -> list[str]:
    """The table of the ranking, and the means of each slice for every measure that is not of the data's answers."""
    head, *rows = ranking["table"]
    lines = [
        f"| {' | '.join(head)} |",
        "|---|" + "---:|" * (len(head) - 1),
        *(f"| {' | '.join(row)} |" for row in rows),
    ]
    for measure in ranking["measures"][:-1]:
        names = list(measure["models"])
        lines += [
            "",
            f"| {measure['name']} | conversations | {' | '.join(names)} |",
            "|---|" + "---:|" * (len(names) + 1),
        ]
        for name, of in measure["slices"].items():
            means = " | ".join(f"{of['models'][model]['mean']:.4f}" for model in names)
            lines.append(f"| {name or 'all'} | {of['conversations']} | {means} |")
    return [*lines, ""]


def write(result: dict, folder: Path) -> None:
    """`compare.json`, `compare.md` and, where matplotlib is installed, `compare.png`."""
    folder.mkdir(parents=True, exist_ok=True)
    write_atomic(folder / "compare.md", ("\n".join(table_lines(result)) + "\n").encode())
    try:
        draw_chart(result, folder / "compare.png")
    except ImportError:
        logger.info("no chart: run pip install 'fusechat[plot]' for %s", folder / "compare.png")
    write_atomic(folder / "compare.json", json_bytes(result))


def draw_chart(result: dict, path: Path) -> None:
    """A bar chart of median bits per byte: slices side by side, one bar per model."""
    from matplotlib.figure import Figure

    names, slices = result["models"], result["slices"]
    figure = Figure(figsize=(max(5.0, 1.0 + 0.35 * len(slices) * (len(names) + 1)), 3.6), layout="constrained")
    axes = figure.add_subplot()
    for m, name in enumerate(names):
        places = np.arange(len(slices)) * (len(names) + 1) + m
        axes.bar(places, [figures["models"][name]["median"] for figures in slices.values()], label=name)
    axes.set_xticks(
        np.arange(len(slices)) * (len(names) + 1) + (len(names) - 1) / 2,
        [f"{name}\n{figures['conversations']}" for name, figures in slices.items()],
    )
    axes.set_ylabel("median bits per byte")
    axes.set_title("Bits per byte of each slice (lower is better)")
    figure.legend(loc="outside lower center", ncols=3, fontsize="small")  # never over a bar
    picture = io.BytesIO()
    figure.savefig(picture, dpi=130)
    write_atomic(path, picture.getvalue())
