"""Two processes (gloo) give the loss and the gradients of one: DDP, FSDP1, fully_shard, ZeRO-3."""

import importlib.util
import json
import os
import socket
import sys
from pathlib import Path

import pytest
import torch

from fusechat_fuse.training.lean_head import install_lean_head
from tests.helpers.distributed_worker import SETTINGS, TRAINED, UNEVEN, trained, uneven
from tests.helpers.fusion_rows import aligned_rows
from tests.helpers.tiny_models import batch_of, tiny_model
from tests.helpers.tiny_runs import run

pytestmark = pytest.mark.distributed
WORLD = 2
CASES = ["ddp", "fsdp1", "fsdp1_own_head", "fully_shard", "fully_shard_own_head"]
DEEPSPEED = importlib.util.find_spec("deepspeed") is not None


@pytest.fixture(scope="module")
def results(tmp_path_factory, forked):
    output = tmp_path_factory.mktemp("distributed")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    cases = [*CASES, *(["zero3"] if DEEPSPEED else [])]
    processes = []
    for rank in range(WORLD):
        environment = {
            **os.environ,
            "PYTHONPATH": os.pathsep.join([".", os.environ.get("PYTHONPATH", "")]),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": port,
            "WORLD_SIZE": str(WORLD),
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "LOCAL_WORLD_SIZE": str(WORLD),
            "OMP_NUM_THREADS": "1",
        }
        command = [sys.executable, "-m", "tests.helpers.distributed_worker", str(output), *cases]
        log = open(output / f"{rank}.log", "w")  # noqa: SIM115
        processes.append(forked.Popen(command, env=environment, cwd=Path(__file__).parents[1], stdout=log, stderr=log))
    try:
        codes = [process.wait(timeout=300) for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert codes == [0] * WORLD, (output / "0.log").read_text()[-3000:]
    return json.loads((output / "results.json").read_text())


@pytest.fixture(scope="module")
def whole():
    """Loss and gradients of one process that sees the batches of all."""
    model = tiny_model()
    install_lean_head(model)
    batches = [batch_of(2, seed=rank) for rank in range(WORLD)]
    batches[-1]["shift_labels"].fill_(-100)
    count = sum((batch["shift_labels"] != -100).sum() for batch in batches)
    total = 0.0
    for batch in batches:
        names = ("input_ids", "attention_mask", "shift_labels", "target_ids", "target_probs")
        out = model(**{name: batch[name] for name in names}, lm_loss_weight=0.9, fusion_loss_type="ce")
        (out.loss / count).backward()
        total += out.loss.item() / count.item()
    return total, {name: p.grad for name, p in model.named_parameters()}


def test_ddp_through_the_trainer(results, tmp_path):
    got = results["ddp"]
    assert got["wrapper"] == "DistributedDataParallel"
    losses, parameters, trainer = run(
        tmp_path,
        aligned_rows(16),
        trainer_options={"eval_dataset": aligned_rows(16)},
        **{**SETTINGS, "per_device_train_batch_size": 4, "gradient_accumulation_steps": 2},
    )
    assert got["losses"] == pytest.approx(losses, rel=1e-5)
    history = trainer.state.log_history
    assert got["lm_losses"] == pytest.approx([e["lm_loss"] for e in history if "lm_loss" in e], rel=1e-5)
    assert got["shares"] == pytest.approx([e["source_share"] for e in history if "source_share" in e])
    for name, value in parameters.items():
        torch.testing.assert_close(torch.tensor(got["parameters"][name]), value, rtol=1e-4, atol=1e-5)
    metrics = trainer.evaluate()
    for name in ("eval_loss", "eval_lm_loss", "eval_fusion_loss", "eval_source_share", "eval_mapped_mass"):
        assert got["eval"][name] == pytest.approx(metrics[name], rel=1e-4)


@pytest.mark.parametrize("case", UNEVEN)
def test_evaluation_does_not_depend_on_the_number_of_processes(results, tmp_path, case):
    alone = uneven(tmp_path, **UNEVEN[case])
    got = results["ddp"]["uneven"][case]
    for name in ("eval_loss", "eval_lm_loss", "eval_fusion_loss", "eval_source_share", "eval_mapped_mass"):
        assert got[name] == pytest.approx(alone[name], rel=1e-5), name


@pytest.mark.parametrize("case", TRAINED)
def test_steps_do_not_depend_on_the_number_of_processes(results, tmp_path, case):
    """Nor does the last of an epoch, which other conversations fill up: they carry no label."""
    got = results["ddp"]["trained"][case]
    same = {name: TRAINED[case][name] for name in ("count", "train_sampling_strategy") if name in TRAINED[case]}
    alone = trained(tmp_path, per_device_train_batch_size=8, **same)
    assert got["conversations"] == alone["conversations"] == 8
    assert got["losses"] == pytest.approx(alone["losses"], rel=1e-5)


@pytest.mark.parametrize(
    ("case", "wrapper", "head"),
    [
        ("fsdp1", "FullyShardedDataParallel", "Linear"),
        ("fsdp1_own_head", "FullyShardedDataParallel", "FullyShardedDataParallel"),
        ("fully_shard", "FSDPModule", "Linear"),
        ("fully_shard_own_head", "FSDPModule", "FSDPLinear"),
        pytest.param(
            "zero3",
            "DeepSpeedEngine",
            [0],
            marks=pytest.mark.skipif(not DEEPSPEED, reason="deepspeed is not installed (pip install deepspeed)"),
        ),
    ],
)
def test_sharded_models(results, whole, case, wrapper, head):
    """One process has labels, the other none: collective operations still match, gradients are those of one process."""
    got, (loss, gradients) = results[case], whole
    assert (got["wrapper"], got["head"]) == (wrapper, head)
    assert got["loss"] == pytest.approx(loss, rel=1e-5)
    assert got["gradients"].keys() == gradients.keys()
    for name, value in gradients.items():
        torch.testing.assert_close(torch.tensor(got["gradients"][name]), value, rtol=1e-4, atol=1e-5)
