"""`fusechat-merge inspect`: the numbers of a merge without the merged model.

mergekit plans and reads as it would for the merge, so filters, gradients, slices and adapters have the same effect.
Each merged tensor is dropped as soon as its row is written.
"""

import shutil
from pathlib import Path

from fusechat_merge import recipe
from fusechat_merge._autoload import OWN
from fusechat_merge.errors import writing
from fusechat_merge.report import Report
from fusechat_merge.reporting import reporter


def inspect(config_path: str | Path, directory: str | Path, *, options=None) -> Report:
    """Write coefficients.csv, summary.json and the pictures of a recipe for sce or varm to a new or empty directory.

    Args:
        options: mergekit.options.MergeOptions; None: mergekit's defaults.

    Raises:
        ValueError: see `recipe.load`; another merge method; a directory with files.
    """
    import torch
    from mergekit.architecture import get_architecture_info
    from mergekit.graph import Executor
    from mergekit.io.tasks import LoaderCache, SaveTensor
    from mergekit.merge import _model_out_config
    from mergekit.options import MergeOptions
    from mergekit.plan import MergePlanner

    from fusechat_merge.running import whole_adapters

    directory = Path(directory)
    if directory.exists() and (not directory.is_dir() or any(directory.iterdir())):
        raise ValueError(
            f"report directory {directory}: expected a new or empty one, got one with files. Choose another."
        )
    options = options or MergeOptions()
    config = recipe.load(config_path)
    if config.merge_method not in OWN:
        raise ValueError(
            f"merge_method in {config_path}: expected sce or varm, got {config.merge_method}. "
            "Inspect a recipe of these methods."
        )
    if config.base_model is None:
        raise ValueError(f"base_model in {config_path}: expected the pivot, got none. Add `base_model: PIVOT`.")
    remedy = "Pass --lora_merge_cache DIR to fusechat-merge inspect (and what it writes to card as --report)."
    recipe.check_adapters(config, str(config_path), bool(options.lora_merge_cache), remedy)
    pivot = str(config.base_model)
    targets = _targets(config)
    report = Report(config.merge_method, pivot, targets, every=1)
    architecture = get_architecture_info(config, options)
    LoaderCache().setup(options=options)
    shape = _model_out_config(config, architecture, trust_remote_code=options.trust_remote_code)
    with reporter.recording(report), whole_adapters(config, options.lora_merge_cache):
        planner = MergePlanner(config, architecture, options=options, out_model_config=shape)
        saved = planner.plan_to_disk(out_path=str(directory))  # nothing is written: only merged tensors are run
        planned = [task.tensor_task for task in saved if isinstance(task, SaveTensor)]
        device = torch.device(options.device or "cpu")
        storage = device if options.low_cpu_memory else torch.device("cpu")
        executor = Executor(targets=planned, math_device=device, storage_device=storage)
        for _ in executor.run(quiet=options.quiet, desc="Inspecting"):
            pass
    _write(report, directory)
    return report


def _write(report: Report, directory: Path) -> None:
    """Write the report whole, or leave the new or empty directory as it was."""
    existed = directory.exists()
    try:
        with writing(f"report {directory}"):
            report.write(directory)
    except BaseException:
        shutil.rmtree(directory, ignore_errors=True)
        if existed:
            directory.mkdir()
        raise


def _targets(config) -> list[str]:
    """The targets in the order of the recipe."""
    named = []
    for holder in (config, *(config.modules or {}).values()):
        named += [model.model for model in holder.models or ()]
        named += [source.model for output in holder.slices or () for source in output.sources]
    return [str(model) for model in dict.fromkeys(named) if model != config.base_model]


def table(summary: dict) -> str:
    """The summary as a short table."""
    width = max([len("tensors of this kind"), *(len(k) for k in summary["coefficients_by_kind"])])
    names = list(summary["targets"])
    columns = [max(len(name), 8) for name in names]
    rows = [("", dict(zip(names, names)), "")]
    rows += [(kind, values, ".4f") for kind, values in summary["coefficients_by_kind"].items()]
    rows.append(("all coefficients", summary["coefficients"], ".4f"))
    rows.append(("update norm", summary["update_norms"], ".4g"))
    rows.append(("erased share", summary["erased_shares"], ".1%"))
    lines = []
    for title, values, pattern in rows:
        cells = ["-" if values.get(name) is None else format(values[name], pattern) for name in names]
        lines.append(f"{title:<{width}}  " + "  ".join(f"{cell:>{size}}" for cell, size in zip(cells, columns)))
    lines += ["", f"{summary['method']}: {summary['tensors']} tensors, {summary['elements']:,} elements"]
    lines.append(f"selected share {summary['selected_share']:.1%}")
    for pair, value in summary["sign_agreement"].items():
        if value is not None:
            lines.append(f"same sign: {pair} {value:.1%}")
    for pair, value in summary["cosines"].items():
        if value is not None:
            lines.append(f"cosine of task vectors: {pair} {value:.3f}")
    if summary["distance_to_linear"] is not None:
        lines.append(f"distance to linear merging: {summary['distance_to_linear']:.1%} of its task vector")
    return "\n".join(lines)
