"""One of several gloo processes: trains through DDP, FSDP1 and fully_shard and writes what it got as JSON.

Run by test_trainer_distributed.py with the environment of torchrun:
python -m tests.helpers.distributed_worker OUTPUT CASE ...
"""

import functools
import json
import sys
from pathlib import Path

import torch
import torch.distributed as dist

from fusechat_fuse.processes import end_process_group
from fusechat_fuse.training.lean_head import install_lean_head
from fusechat_fuse.training.trainer import FusionTrainer
from tests.helpers.fusion_rows import aligned_rows
from tests.helpers.tiny_models import batch_of, tiny_model
from tests.helpers.tiny_runs import config

UNEVEN = {
    "5 of 8": {"count": 5},
    "1 of 8": {"count": 1},
    "11 of 16": {"count": 11},
    "packed": {"count": 5, "packing": True},
    "split": {"count": 7, "accelerator_config": {"split_batches": True}},
}
TRAINED = {  # rows that the processes cannot share evenly
    "filled": {"count": 11, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2},
    "filled, packed": {"count": 9, "per_device_train_batch_size": 4, "packing": True},
    "rebalanced": {
        "count": 12,
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "train_sampling_strategy": "batch_rebalance",
    },
    "split": {
        "count": 11,
        "per_device_train_batch_size": 4,
        "total_batch_size": 8,
        "gradient_accumulation_steps": None,
        "accelerator_config": {"split_batches": True},
    },
}
SETTINGS = {"train_sampling_strategy": "sequential", "lr_scheduler_type": "constant", "warmup_steps": 0}


def ddp(output: Path) -> dict:
    """FusionTrainer as torchrun starts it: accelerate wraps the model in DistributedDataParallel."""
    settings = {**SETTINGS, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}
    rows = aligned_rows(16)
    trainer = FusionTrainer(tiny_model(), config(output / "ddp", **settings), train_dataset=rows, eval_dataset=rows)
    trainer.train()
    return {
        "wrapper": type(trainer.model_wrapped).__name__,
        "losses": [entry["loss"] for entry in trainer.state.log_history if "loss" in entry],
        "lm_losses": [entry["lm_loss"] for entry in trainer.state.log_history if "lm_loss" in entry],
        "shares": [entry["source_share"] for entry in trainer.state.log_history if "source_share" in entry],
        "parameters": {name: p.tolist() for name, p in trainer.model.named_parameters()},
        "eval": trainer.evaluate(),
        "uneven": {name: uneven(output, **settings) for name, settings in UNEVEN.items()},
        "trained": {name: trained(output, **settings) for name, settings in TRAINED.items()},
    }


def trained(output: Path, count: int, **settings) -> dict:
    """One epoch of as many conversations as the processes cannot share evenly."""
    arguments = config(output / "trained", optim="sgd", max_grad_norm=0.0, **{**SETTINGS, **settings})
    trainer = FusionTrainer(tiny_model(), arguments, train_dataset=aligned_rows(count))
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    return {"conversations": arguments.conversations_per_step, "losses": losses}


def uneven(output: Path, count: int, **settings) -> dict:
    """Evaluation of as many conversations as the processes cannot share evenly."""
    arguments = config(output / "uneven", per_device_eval_batch_size=4, **settings)
    return FusionTrainer(tiny_model(), arguments, eval_dataset=aligned_rows(count)).evaluate()


def local_batch(rank: int) -> dict:
    """Each process its own conversations, of other lengths; the last process has nothing labelled."""
    batch = batch_of(2, seed=rank)
    if rank == dist.get_world_size() - 1:
        batch["shift_labels"].fill_(-100)
    return batch


def step(model, backward=torch.Tensor.backward) -> float:
    """Forward and backward as compute_loss does it: the local sum times processes over the global count."""
    batch = local_batch(dist.get_rank())
    count = (batch["shift_labels"] != -100).sum()
    dist.all_reduce(count)
    names = ("input_ids", "attention_mask", "shift_labels", "target_ids", "target_probs")
    out = model(**{name: batch[name] for name in names}, lm_loss_weight=0.9, fusion_loss_type="ce")
    loss = out.loss * dist.get_world_size() / count
    backward(loss)
    total = loss.detach() / dist.get_world_size()
    dist.all_reduce(total)
    return total.item()


def fsdp1(output: Path, own_head: bool) -> dict:
    from torch.distributed.fsdp import FullyShardedDataParallel

    model = tiny_model()
    install_lean_head(model)
    units = [*model.model.layers, *([model.lm_head] if own_head else [])]
    wrapped = FullyShardedDataParallel(
        model,
        auto_wrap_policy=lambda module, recurse, nonwrapped_numel: recurse or any(module is unit for unit in units),
        use_orig_params=True,
        device_id=torch.device("cpu"),
    )
    loss = step(wrapped)
    with FullyShardedDataParallel.summon_full_params(wrapped, with_grads=True):
        gradients = {
            name.replace("_fsdp_wrapped_module.", ""): p.grad.tolist() for name, p in wrapped.named_parameters()
        }
    head_type = type(wrapped.module.lm_head).__name__
    return {"wrapper": type(wrapped).__name__, "head": head_type, "loss": loss, "gradients": gradients}


def fully_shard(output: Path, own_head: bool) -> dict:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import FSDPModule
    from torch.distributed.fsdp import fully_shard as shard

    model = tiny_model()
    install_lean_head(model)
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for layer in model.model.layers:
        shard(layer, mesh=mesh)
    if own_head:
        shard(model.lm_head, mesh=mesh)
    shard(model, mesh=mesh)
    loss = step(model)
    return {
        "wrapper": "FSDPModule" if isinstance(model, FSDPModule) else type(model).__name__,
        "head": type(model.lm_head).__name__,
        "loss": loss,
        "gradients": {name: p.grad.full_tensor().tolist() for name, p in model.named_parameters()},
    }


def zero3(output: Path, own_head: bool) -> dict:
    """DeepSpeed ZeRO-3 without accelerate: parameters are partitioned, lm_head is gathered by its own hooks."""
    import deepspeed
    from deepspeed.utils import safe_get_full_grad

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # gloo will do; this would be compiled first
    model = tiny_model()
    install_lean_head(model)
    settings = {
        "train_micro_batch_size_per_gpu": 2,
        "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0},
        "optimizer": {"type": "SGD", "params": {"lr": 0.0}},
        "zero_allow_untested_optimizer": True,
    }
    engine, *_ = deepspeed.initialize(model=model, config=settings, model_parameters=model.parameters())
    loss = step(engine, engine.backward)
    return {
        "wrapper": type(engine).__name__,
        "head": tuple(model.lm_head.weight.shape),  # nothing between forwards
        "loss": loss,
        "gradients": {name: safe_get_full_grad(p).tolist() for name, p in model.named_parameters()},
    }


CASES = {
    "ddp": ddp,
    "fsdp1": functools.partial(fsdp1, own_head=False),
    "fsdp1_own_head": functools.partial(fsdp1, own_head=True),
    "fully_shard": functools.partial(fully_shard, own_head=False),
    "fully_shard_own_head": functools.partial(fully_shard, own_head=True),
    "zero3": functools.partial(zero3, own_head=True),
}


def main() -> None:
    output = Path(sys.argv[1])
    torch.set_num_threads(1)
    results = {}
    for name in sys.argv[2:] or CASES:
        results[name] = CASES[name](output)
        if not dist.is_initialized():
            dist.init_process_group("gloo")
        if dist.get_rank() == 0:
            (output / "results.json").write_text(json.dumps(results))
    end_process_group()


if __name__ == "__main__":
    main()
