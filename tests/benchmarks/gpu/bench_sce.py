"""SCE of one tensor on the GPU beside mergekit's own, as copies of the same bytes; and a 1B recipe by `--cuda`.

    python -m tests.benchmarks.gpu.bench_sce [--save FOLDER] [--recipe]

Five targets as in bench_merge. Copies: the time of moving every input once into one buffer on the same card. Error: of
the update (merged minus pivot) against float64. "as CPU": share of the elements of the first million that are bit for
bit what the CPU's passes give. --recipe: mergekit-yaml over a 1B-shaped model and two targets, on the CPU and with
--cuda, whole processes.
"""

import argparse
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

from fusechat_merge.kernel import sce_merge
from tests.benchmarks.bench_merge import exact_update, inputs
from tests.benchmarks.gpu import card

HEAD = 1_000_000  # elements that the CPU merges too


def shipped(pivot, targets, tau):
    """mergekit's own sce, called as mergekit calls it."""
    from mergekit.merge_methods import merge_tensors
    from mergekit.merge_methods.sce import sce_merge as method

    return merge_tensors([pivot, *targets], method, base_index=0, parameters={"select_topk": tau})


def ours(pivot, targets, tau):
    return sce_merge(pivot, targets, select_topk=tau)


def one_tensor(elements: int, dtype: torch.dtype, tau: float, turns: int) -> list[dict]:
    on_cpu = inputs(elements, dtype)
    tensors = [tensor.to(card.device()) for tensor in on_cpu]
    exact = exact_update(on_cpu, tau) if elements < 20_000_000 else None  # float64 on the CPU: minutes beyond
    buffer = torch.empty_like(tensors[0])

    def copies():
        for tensor in tensors:
            buffer.copy_(tensor)

    copied = card.measure(copies, turns=10)["seconds"]
    lines = []
    for name, method in (("shipped", shipped), ("ours", ours)):
        kept = {}

        def step(method=method, kept=kept):
            kept["merged"] = method(tensors[0], tensors[1:], tau)

        found = card.measure(step, turns, forget=kept.clear)
        line = {"elements": elements, "dtype": str(dtype).removeprefix("torch."), "tau": tau, "way": name, **found}
        line["copies"] = found["seconds"] and found["seconds"] / copied
        if exact is not None and "merged" in kept:
            update = kept["merged"][: len(exact)].cpu().double() - on_cpu[0][: len(exact)].double()
            line["error"] = float((update - exact).norm() / exact.norm())
        lines.append(line)
    whole = [tensor[:HEAD] for tensor in on_cpu]
    there = ours(whole[0].to(card.device()), [t.to(card.device()) for t in whole[1:]], tau).cpu()
    lines[-1]["as_cpu"] = float((there == ours(whole[0], whole[1:], tau)).double().mean())
    return lines


def recipe(shape: dict) -> list[dict]:
    """Seconds of mergekit-yaml, the CPU's and --cuda; and how far the two results are apart."""
    import yaml
    from safetensors.torch import load_file
    from transformers import LlamaConfig, LlamaForCausalLM

    lines = []
    with tempfile.TemporaryDirectory() as folder:
        torch.manual_seed(0)
        with torch.device(card.device()):
            model = LlamaForCausalLM(LlamaConfig(**shape)).bfloat16()
        for name in ("pivot", "a", "b"):
            model.save_pretrained(f"{folder}/{name}")
            with torch.no_grad():
                for weight in model.parameters():
                    weight.add_(1e-3 * torch.randn_like(weight))
        del model
        models = [{"model": f"{folder}/{name}"} for name in ("pivot", "a", "b")]
        how = {"merge_method": "sce", "base_model": f"{folder}/pivot", "dtype": "bfloat16", "models": models}
        Path(folder, "recipe.yml").write_text(yaml.safe_dump(how))
        for name, flags in (("cpu", []), ("cuda", ["--cuda"])):
            if name == "cuda" and card.device().type == "cpu":
                continue
            started = time.perf_counter()
            command = [sys.executable, "-m", "mergekit.scripts.run_yaml", f"{folder}/recipe.yml", f"{folder}/{name}"]
            done = subprocess.run([*command, *flags], capture_output=True, text=True, check=False)
            if done.returncode:
                raise RuntimeError(done.stderr[-1500:])
            lines.append({"recipe": name, "seconds": time.perf_counter() - started})
        if len(lines) == 2:
            same = total = 0
            for file in sorted(Path(folder, "cpu").glob("*.safetensors")):
                cpu, cuda = load_file(file), load_file(Path(folder, "cuda", file.name))
                for key, tensor in cpu.items():
                    same, total = same + int((tensor == cuda[key]).sum()), total + tensor.numel()
            lines[1]["as_cpu"] = same / total
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--save", metavar="FOLDER")
    parser.add_argument("--recipe", action="store_true")
    options = parser.parse_args()
    on_gpu = card.device().type == "cuda"
    lines = []
    print(f"{card.describe()}\nelements dtype     tau  way          ms  copies  peak B/element  error    as CPU")
    for elements in (17_000_000, 59_000_000) if on_gpu else (100_000,):
        for dtype in (torch.bfloat16, torch.float32):
            for tau in (1.0, 0.1):
                for line in one_tensor(elements, dtype, tau, turns=5):
                    lines.append(line)
                    print(
                        f"{elements // 1000:7}k {line['dtype']:9} {tau:<4} {line['way']:8}"
                        f"{card.cell(line['seconds'] and 1000 * line['seconds'], '7.2f'):>7}"
                        f"{card.cell(line.get('copies'), '8.1f'):>8}"
                        f"{card.cell(line['peak'] and line['peak'] / elements, '16.1f'):>16}"
                        f"  {card.cell(line.get('error'), '.1e'):8} {card.cell(line.get('as_cpu'), '.6f')}",
                        flush=True,
                    )
    if options.recipe:
        shape = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "vocab_size": 1000}
        if on_gpu:  # the shape of Llama 3.2 1B
            shape = {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "vocab_size": 128_256}
        for line in recipe({**shape, "num_attention_heads": 16, "num_key_value_heads": 8, "tie_word_embeddings": True}):
            lines.append(line)
            print(line, flush=True)
    card.save("sce", lines, options.save)


if __name__ == "__main__":
    main()
