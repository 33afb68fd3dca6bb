"""mergekit-yaml on a synthetic pivot and five bfloat16 targets: our `sce` against the shipped one, whole command.

    python tests/benchmarks/bench_merge_end_to_end.py [--millions 1000] [--tau 1.0] [--directory DIR]

Checkpoints are Llama-shaped, in shards of 500 MB, task vectors of standard deviation 3e-5 to 3e-4. Each run is a
process of its own, in turn; time is the whole command's, memory the peak of its resident set (memory-mapped pages
included). The third line writes the merge report as well, the fourth copies the six inputs' bytes to the output's disk.
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
import yaml
from safetensors.torch import load_file, save_file

SCALES = (3e-5, 1e-4, 3e-4, 1e-4, 3e-5)
SHARD_BYTES = 500_000_000
RUN = "import sys, fusechat_merge; fusechat_merge.register(); from mergekit.scripts.run_yaml import main; main()"
SHIPPED = "from mergekit.scripts.run_yaml import main; main()"


def shapes(millions: int) -> tuple[dict, dict[str, tuple[int, ...]]]:
    """(config, tensor shapes) of a Llama of about so many parameters."""
    hidden = 2048 if millions >= 500 else 512
    mlp, vocab = 11 * hidden // 4, 32000
    per_layer = 4 * hidden * hidden + 3 * hidden * mlp
    layers = max(1, round((millions * 1e6 - 2 * vocab * hidden) / per_layer))
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": vocab,
        "hidden_size": hidden,
        "intermediate_size": mlp,
        "num_hidden_layers": layers,
        "num_attention_heads": 16,
        "num_key_value_heads": 16,
        "tie_word_embeddings": False,
    }
    names = {"model.embed_tokens.weight": (vocab, hidden)}
    for layer in range(layers):
        prefix = f"model.layers.{layer}."
        names |= {f"{prefix}self_attn.{p}_proj.weight": (hidden, hidden) for p in "qkvo"}
        names |= {f"{prefix}mlp.{p}_proj.weight": (mlp, hidden) for p in ("gate", "up")}
        names[f"{prefix}mlp.down_proj.weight"] = (hidden, mlp)
        names |= {f"{prefix}{p}_layernorm.weight": (hidden,) for p in ("input", "post_attention")}
    return config, names | {"model.norm.weight": (hidden,), "lm_head.weight": (vocab, hidden)}


def write(directory: Path, config: dict, names: dict, scale: float | None, seed: int) -> None:
    """A checkpoint: the pivot's numbers depend on the tensor only, a target adds its own noise."""
    directory.mkdir()
    (directory / "config.json").write_text(json.dumps(config))
    shard, size, shards, index = {}, 0, [], {}
    for place, (name, shape) in enumerate(names.items()):
        generator = torch.Generator().manual_seed(place)
        tensor = 0.02 * torch.randn(shape, generator=generator)
        if scale is not None:
            generator.manual_seed(1_000_003 * (seed + 1) + place)
            tensor += scale * torch.randn(shape, generator=generator)
        shard[name] = tensor.bfloat16()
        size += 2 * tensor.numel()
        if size >= SHARD_BYTES or place == len(names) - 1:
            shards.append(f"model-{len(shards) + 1:05d}.safetensors")
            save_file(shard, directory / shards[-1], metadata={"format": "pt"})
            index |= {key: shards[-1] for key in shard}
            shard, size = {}, 0
    (directory / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))


def run(code: str, config: Path, out: Path, threads: int, **environment: str) -> tuple[float, int]:
    """(seconds, peak resident bytes) of one command."""
    flags = ["--no-copy-tokenizer", "--no-write-model-card", "--quiet", "--out-shard-size", "500M", "-j", str(threads)]
    command = [sys.executable, "-c", code, str(config), str(out), *flags]
    start = time.perf_counter()
    process = subprocess.Popen(
        command, env={**os.environ, "HF_HUB_OFFLINE": "1", **environment}, stderr=subprocess.PIPE
    )
    errors = process.stderr.read().decode()
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        sys.exit(errors)
    return time.perf_counter() - start, usage.ru_maxrss * 1024


def copy_seconds(models: list[Path], out: Path) -> float:
    """Reading all inputs and writing one of them, without arithmetic."""
    out.mkdir()
    start = time.perf_counter()
    for model in models:
        for shard in sorted(model.glob("*.safetensors")):
            data = load_file(shard)
            if model == models[0]:
                save_file({name: tensor.clone() for name, tensor in data.items()}, out / shard.name)
            else:
                for tensor in data.values():
                    tensor.clone()
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--millions", type=int, default=1000, help="parameters of each model")
    parser.add_argument("--tau", type=float, default=1.0)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--directory", help="where the checkpoints go (default: a temporary directory)")
    arguments = parser.parse_args()
    root = Path(tempfile.mkdtemp(dir=arguments.directory))
    try:
        config, names = shapes(arguments.millions)
        models = [root / "pivot", *(root / f"target{j}" for j in range(len(SCALES)))]
        for seed, (model, scale) in enumerate(zip(models, (None, *SCALES))):
            write(model, config, names, scale, seed)
        recipe = root / "sce.yml"
        entries = [{"model": str(model)} for model in models[1:]]
        document = {"merge_method": "sce", "base_model": str(models[0]), "models": entries, "dtype": "bfloat16"}
        recipe.write_text(yaml.safe_dump(document | {"parameters": {"select_topk": arguments.tau}}))
        ways = {
            "ours": (RUN, {}),
            "shipped": (SHIPPED, {"FUSECHAT_MERGE_AUTOLOAD": "0"}),
            "ours with report": (RUN, {"FUSECHAT_MERGE_REPORT": str(root / "reports")}),
        }
        seconds, memory = {name: [] for name in [*ways, "copy"]}, {}
        for turn in range(arguments.repeats):
            for name, (code, environment) in ways.items():
                spent, peak = run(code, recipe, root / f"out-{name}-{turn}", arguments.threads, **environment)
                seconds[name].append(spent)
                memory[name] = max(memory.get(name, 0), peak)
                shutil.rmtree(root / f"out-{name}-{turn}")
            seconds["copy"].append(copy_seconds(models, root / f"copy-{turn}"))
            shutil.rmtree(root / f"copy-{turn}")
        medians = {name: statistics.median(values) for name, values in seconds.items()}
        parameters = sum(torch.Size(shape).numel() for shape in names.values())
        print(
            f"{parameters / 1e6:.0f}M parameters, 5 targets, bfloat16, tau {arguments.tau}, {arguments.threads} threads"
        )
        for name, value in medians.items():
            peak = f"{memory[name] / 2**30:6.2f} GiB peak" if name in memory else ""
            print(f"{name:>17} {value:8.1f} s {medians['shipped'] / value:6.2f}x {peak}")
        line = {"benchmark": "merge_end_to_end", "parameters": parameters, "tau": arguments.tau, "seconds": medians}
        print(json.dumps(line | {"peak_bytes": memory}))
    finally:
        shutil.rmtree(root)


if __name__ == "__main__":
    main()
