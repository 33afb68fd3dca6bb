"""Do the tests see a broken line? 26 lines over all rooms are broken, one at a time, in a copy of the tree.

    python tests/mutants.py [--root TREE] [--only NAME ...]

A mutant is killed when its tests fail. Prints a table and one line of JSON; exits with 1 where a mutant survives. A
line is found by its text wherever it stands, so that it may move between modules (`--root` takes an older tree).
"""

import argparse
import contextlib
import json
import os
import shlex
import shutil
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

os.environ.update(OMP_NUM_THREADS="1", HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false", CUDA_VISIBLE_DEVICES="")
import pytest

ROOT = Path(__file__).resolve().parents[1]


class Mutant(NamedTuple):
    name: str
    old: str  # occurs once in the packages
    new: str
    tests: str  # files, and further arguments of pytest


MUTANTS = [
    Mutant(
        "sce: scopes of the selection swapped",
        'select_scope == "all" else None',
        'select_scope != "all" else None',
        "tests/test_merge_kernel.py",
    ),
    Mutant(
        "sce: sign of the majority",
        "sign = torch.where(rows.sum(0) >= 0, 1.0, -1.0)",
        "sign = torch.where(rows.sum(0) <= 0, 1.0, -1.0)",
        "tests/test_merge_kernel.py",
    ),
    Mutant(
        "sce: one element too many selected",
        "kept = math.floor(tau * differing)",
        "kept = math.ceil(tau * differing)",
        "tests/test_merge_kernel.py",
    ),
    Mutant(
        "sce: mergekit's equal coefficients for small updates",
        "eta = _shares(sums, weights)",
        "eta = _shares(sums if sums.sum() >= 1e-6 * passes.numel else torch.ones_like(sums), weights)",
        "tests/test_merge_kernel.py",
    ),
    Mutant(
        "sce: select_topk is not checked",
        "if not 0 <= tau <= 1:",
        "if not 0 <= tau:",
        "tests/test_merge_kernel.py",
    ),
    Mutant(
        "loss: sign of the fusion gradient",
        "probs_NK * -fusion_weight)",
        "probs_NK * fusion_weight)",
        "tests/test_loss.py",
    ),
    Mutant(
        "loss: weights swapped",
        "return lm_loss_weight * lm + (1 - lm_loss_weight) * fusion",
        "return (1 - lm_loss_weight) * lm + lm_loss_weight * fusion",
        "tests/test_loss.py",
    ),
    Mutant(
        "cross-entropy: bytes forgotten",
        'return ce * int(row["source_tokens"]) / num_bytes if',
        'return ce * int(row["source_tokens"]) if',
        "tests/test_choice.py tests/test_slice_choice.py",
    ),
    Mutant(
        "choice: the worse model is taken",
        "taken = source_ce < pivot_ce  #",
        "taken = source_ce > pivot_ce  #",
        "tests/test_choice.py",
    ),
    Mutant(
        "choice: label noise has no effect",
        "tail / (tail + noise) if noise",
        "tail / tail if noise",
        "tests/test_tail.py",
    ),
    Mutant(
        "slices: sign of the gap",
        "gap = min(medians[best] - medians[0], 0.0)",
        "gap = min(medians[0] - medians[best], 0.0)",
        "tests/test_slice_choice.py",
    ),
    Mutant(
        "collator: distributions one position late",
        'batch["target_ids"][b, at - 1, :width]',
        'batch["target_ids"][b, at, :width]',
        "tests/test_collator.py",
    ),
    Mutant(
        "collator: one predicted token beyond the cut",
        'np.searchsorted(row["predicted"], self.max_length)',
        'np.searchsorted(row["predicted"], self.max_length + 1)',
        "tests/test_collator.py",
    ),
    Mutant(
        "lean head: divisor taken for a scale",
        "z = z / self.divisor",
        "z = z * self.divisor",
        "tests/test_logit_transform.py",
    ),
    Mutant(
        "capture: distributions of the token itself",
        "self._run(ids.to(self.device), rows, columns - 1,",
        "self._run(ids.to(self.device), rows, columns,",
        "tests/test_capture.py -k values_are_the_models_own",
    ),
    Mutant(
        "compare: nats for bits",
        'bits = float(np.sum(row["ce"], dtype=np.float64)) / np.log(2)',
        'bits = float(np.sum(row["ce"], dtype=np.float64))',
        "tests/test_compare.py",
    ),
    Mutant(
        "prefix: the actual token's share is lost",
        "D = row_sums(probs) + candidates.actual[q]",
        "D = row_sums(probs)",
        "tests/test_prefix.py",
    ),
    Mutant(
        "prefix: source tokens that reach beyond are whole",
        "(source.end[last] >= pivot.end[p])",
        "(source.end[last] <= pivot.end[p])",
        "tests/test_prefix.py tests/test_alignment_oracle.py",
    ),
    Mutant(
        "correspondence: headers are free of bias",
        "& ~spanned & ~after_header",
        "& ~spanned",
        "tests/test_correspondence.py",
    ),
    Mutant(
        "spans: byte offsets without the gaps",
        "ends = np.cumsum(lengths + gaps[:-1])",
        "ends = np.cumsum(lengths)",
        "tests/test_tokens.py",
    ),
    Mutant(
        "store: scale of compact cross-entropies",
        '(unpack(row["c_ce"], 4) / 2**13)',
        '(unpack(row["c_ce"], 4) / 2**12)',
        "tests/test_format.py",
    ),
    Mutant(
        "conversations: turns need not alternate",
        'if body[n]["role"] == body[n - 1]["role"]:',
        'if body[n]["role"] == "nobody":',
        "tests/test_conversations.py",
    ),
    Mutant(
        "combine: the worst source is taken",
        "best = rows[int(np.argmin(best_ce))]",
        "best = rows[int(np.argmax(best_ce))]",
        "tests/test_combination.py",
    ),
    Mutant(
        "server: the answer for the token before",
        "entry = entries[position]",
        "entry = entries[position - 1]",
        "tests/test_server.py -k 'not killed'",
    ),
    Mutant(
        "recipe: sources are not shown the pivot's template",
        'None if name == "pivot" else self.recipe.pivot.model',
        'None if name != "pivot" else self.recipe.pivot.model',
        "tests/test_pipeline.py -k becomes_commands",
    ),
    Mutant(
        "plan: experts that idle are counted",
        "- outside - experts * (1 - share)",
        "- outside",
        "tests/test_plan.py -k weights_are_counted",
    ),
]


def place_of(mutant: Mutant, tree: Path) -> Path:
    """The one module that holds the line."""
    found = [path for path in tree.glob("fusechat_*/**/*.py") if mutant.old in path.read_text()]
    if len(found) != 1 or found[0].read_text().count(mutant.old) != 1:
        raise SystemExit(f"{mutant.name}: expected {mutant.old!r} once, got it in {len(found)} modules of {tree}.")
    return found[0]


def run_tests(tree: Path, arguments: list[str]) -> tuple[bool, str]:
    """(whether all passed, what pytest printed), in a forked process whose packages are those of the tree."""
    with tempfile.TemporaryFile("w+") as told:
        process = os.fork()
        if process == 0:
            os.chdir(tree)
            os.dup2(told.fileno(), 1)
            os.dup2(told.fileno(), 2)
            sys.path[0] = os.environ["PYTHONPATH"] = str(tree)
            for name in [name for name in sys.modules if name.split(".")[0] in ("fusechat_fuse", "fusechat_merge")]:
                del sys.modules[name]  # the start-up hook's
            code = 3
            with contextlib.suppress(BaseException):
                code = pytest.main(["-q", "-x", "-p", "no:cacheprovider", *arguments])
            sys.stdout.flush()
            os._exit(code)
        code = os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
        told.seek(0)
        if code not in (0, 1):
            raise SystemExit(f"pytest {shlex.join(arguments)} ended with exit code {code}:\n{told.read()[-2000:]}")
        return code == 0, told.read()


def first_failure(told: str) -> str:
    failed = [line for line in told.splitlines() if line.startswith(("FAILED", "ERROR"))]
    return failed[0].split(" - ")[0].split("::")[-1] if failed else ""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--root", type=Path, default=ROOT, help="the tree that is copied and broken")
    parser.add_argument("--only", nargs="*", default=[""], metavar="NAME", help="mutants whose name begins so")
    options = parser.parse_args()
    chosen = [mutant for mutant in MUTANTS if mutant.name.startswith(tuple(options.only))]
    import torch
    import transformers.trainer  # noqa: F401

    torch.set_num_threads(1)
    killed = {}
    with tempfile.TemporaryDirectory() as folder:
        tree = Path(folder, "tree")
        shutil.copytree(options.root, tree, ignore=shutil.ignore_patterns(".*", "__pycache__", "*.egg-info", "build"))
        places = [place_of(mutant, tree) for mutant in chosen]
        for tests in dict.fromkeys(mutant.tests for mutant in chosen):
            passed, told = run_tests(tree, shlex.split(tests))
            if not passed:
                raise SystemExit(f"{tests}: expected to pass before a line is broken.\n{told[-2000:]}")
        for mutant, place in zip(chosen, places, strict=True):
            whole, started = place.read_text(), time.monotonic()
            place.write_text(whole.replace(mutant.old, mutant.new))
            passed, told = run_tests(tree, shlex.split(mutant.tests))
            place.write_text(whole)
            killed[mutant.name] = not passed
            result = "SURVIVED" if passed else f"killed by {first_failure(told)}"
            where = place.relative_to(tree)
            print(f"{mutant.name:50} {where!s:45} {time.monotonic() - started:5.0f} s  {result}", flush=True)
    print(json.dumps({"mutants": len(killed), "killed": sum(killed.values()), "by_name": killed}))
    sys.exit(0 if all(killed.values()) else 1)


if __name__ == "__main__":
    main()
