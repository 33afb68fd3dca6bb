"""The methods as mergekit sees them: its Python functions, its runs on checkpoints, its parameters, and our errors."""

import json
import logging
import shutil
import threading

import pytest
import torch
import yaml
from mergekit.config import MergeConfiguration
from mergekit.merge import run_merge
from mergekit.merge_methods import merge_state_dicts, merge_tensors
from mergekit.options import MergeOptions

import fusechat_merge
from fusechat_merge import kernel, sce, varm
from tests.helpers.merge_checkpoints import read, recipe, write_family, write_llama

pytestmark = pytest.mark.slow

QUIET = MergeOptions(quiet=True, copy_tokenizer=False, write_model_card=False)


@pytest.fixture(autouse=True)
def registered(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    fusechat_merge.register()


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    return write_family(tmp_path_factory.mktemp("models"), layers=3)


def tensors(shape=(50, 4), dtype=torch.float32, count=3):
    generator = torch.Generator().manual_seed(1)
    pivot = 0.02 * torch.randn(shape, generator=generator)
    moved = [pivot + 1e-4 * (j + 1) * torch.randn(shape, generator=generator) for j in range(count)]
    return [t.to(dtype) for t in (pivot, *moved)]


def merge(config, out, options=QUIET):
    run_merge(MergeConfiguration.model_validate(config), str(out), options)
    return read(out)


def change_config(directory, **changes):
    path = directory / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    return directory


# --- Python ---------------------------------------------------------------------------------------------------------


def test_merge_tensors_takes_the_object_or_the_name():
    pivot, *targets = tensors()
    expected = kernel.sce_merge(pivot, targets, select_topk=0.5)
    for method in (sce, "sce"):
        merged = merge_tensors([pivot, *targets], method, base_index=0, parameters={"select_topk": 0.5})
        assert torch.equal(merged, expected)
    shuffled = merge_tensors([targets[0], pivot, *targets[1:]], sce, base_index=1, parameters={"select_topk": 0.5})
    assert torch.equal(shuffled, expected)
    for granularity in kernel.GRANULARITIES:
        merged = merge_tensors([pivot, *targets], varm, base_index=0, parameters={"granularity": granularity})
        assert torch.equal(merged, kernel.varm_merge(pivot, targets, granularity=granularity))


def test_merge_state_dicts_merges_weights_and_copies_agreed_buffers():
    pivot, first, second = (
        {"w": a, "b": b, "steps": torch.tensor([3, 4])} for a, b in zip(tensors(count=2), tensors((7,), count=2))
    )
    merged = merge_state_dicts({"pivot": pivot, "x": first, "y": second}, sce, base="pivot")
    for name in ("w", "b"):
        assert torch.equal(merged[name], kernel.sce_merge(pivot[name], [first[name], second[name]]))
    assert merged["steps"].tolist() == [3, 4]
    second["steps"] = torch.tensor([3, 5])
    with pytest.raises(ValueError, match="steps"):
        merge_state_dicts({"pivot": pivot, "x": first, "y": second}, sce, base="pivot")


@pytest.mark.parametrize("weights", [[2.0, 1.0, 0.0], {1: 2.0, 2: 1.0, 3: 0.0}, [None, 2.0, 1.0, 0.0]])
def test_weights_are_given_for_the_targets(weights):
    pivot, *targets = tensors()
    merged = merge_tensors([pivot, *targets], sce, base_index=0, parameters={"weight": weights})
    assert torch.equal(merged, kernel.sce_merge(pivot, targets, weights=[2.0, 1.0, 0.0]))
    assert torch.equal(
        merge_tensors([pivot, *targets], varm, base_index=0, parameters={"weight": weights}),
        kernel.varm_merge(pivot, targets, weights=[2.0, 1.0, 0.0]),
    )


def test_dtypes_are_read_as_stored_and_promoted_in_the_result():
    pivot, first, second = tensors(count=2)
    mixed = [pivot.bfloat16(), first.half(), second]
    expected = kernel.sce(mixed[0], mixed[1:], dtype=torch.float32).merged
    assert torch.equal(merge_tensors(mixed, sce, base_index=0), expected)
    halved = merge_tensors(mixed, sce, base_index=0, out_dtype=torch.bfloat16)
    assert torch.equal(halved, expected.bfloat16())
    asked = merge_tensors(mixed, sce, base_index=0, dtype=torch.bfloat16)
    assert torch.equal(asked, kernel.sce_merge(mixed[0], [t.bfloat16() for t in mixed[1:]]))


def test_several_threads_may_merge_at_once():  # as mergekit's multi-GPU executor does
    inputs = tensors((300, 400), torch.bfloat16)
    expected = merge_tensors(inputs, sce, base_index=0, parameters={"select_topk": 0.3})
    results = []
    work = lambda: results.append(merge_tensors(inputs, sce, base_index=0, parameters={"select_topk": 0.3}))  # noqa: E731
    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == 4
    assert all(torch.equal(result, expected) for result in results)


def test_int8_mask_is_accepted_and_changes_nothing():
    inputs = tensors()
    merged = merge_tensors(inputs, sce, base_index=0, parameters={"int8_mask": True})
    assert torch.equal(merged, merge_tensors(inputs, sce, base_index=0))


@pytest.mark.parametrize(
    ("method", "parameters", "message"),
    [
        (sce, {"select_topk": 1.7}, r"select_topk for sce: expected a number in \[0, 1\], got 1.7"),
        (sce, {"select_topk": -0.1}, r"select_topk for sce: expected a number in \[0, 1\], got -0.1"),
        (sce, {"select_topk": True}, r"select_topk for sce: expected a number in \[0, 1\], got True"),
        (sce, {"select_topk": "half"}, r"select_topk for sce: expected a number in \[0, 1\], got 'half'"),
        (sce, {"select_scope": "half"}, "select_scope for sce: expected all or coefficients, got 'half'"),
        (varm, {"granularity": "row"}, "granularity for varm: expected matrix or element, got 'row'"),
        (sce, {"weight": [1, -1, 1]}, "weight for sce and varm: expected a number >= 0, got -1"),
        (sce, {"weight": [0.5, 1, 1, 1]}, "weight for the pivot 0: expected none, got 0.5"),
        (sce, {"density": 0.5}, "density"),
    ],
)
def test_refused_parameters_are_named(method, parameters, message):
    with pytest.raises((ValueError, TypeError), match=message) as caught:
        merge_tensors(tensors(), method, base_index=0, parameters=parameters)
    if "density" not in parameters:
        assert "errors.pydantic.dev" not in str(caught.value)


@pytest.mark.parametrize(
    ("count", "base_index", "message"),
    [
        (3, None, "base_model for sce: expected the pivot, got none"),
        (0, 0, "expected at least one target beside the pivot 0, got none"),
    ],
)
def test_missing_pivot_and_missing_targets_are_named(count, base_index, message):
    with pytest.raises(ValueError, match=message):
        merge_tensors(tensors(count=count), sce, base_index=base_index)


def test_float8_is_refused_with_the_tensor_and_the_model():
    pivot, first, second = ({"w": t} for t in tensors(count=2))
    second["w"] = second["w"].to(torch.float8_e4m3fn)
    with pytest.raises(ValueError, match=r"dtype for tensor w of y: expected float32.*got float8_e4m3fn"):
        merge_state_dicts({"pivot": pivot, "x": first, "y": second}, sce, base="pivot")


# --- checkpoints ----------------------------------------------------------------------------------------------------


def test_run_merge_gives_the_kernel_s_numbers(models, tmp_path, caplog):
    pivot, targets = models
    with caplog.at_level(logging.INFO):
        merged = merge(recipe(pivot, targets, select_topk=0.5), tmp_path / "out")
    assert "merge_method sce is served by fusechat" in caplog.text
    base, moved = read(pivot), [read(target) for target in targets]
    for name, tensor in base.items():
        assert torch.equal(merged[name], kernel.sce_merge(tensor, [m[name] for m in moved], select_topk=0.5)), name
    listed = recipe(pivot, targets, select_topk=0.5)
    listed["models"].insert(1, {"model": str(pivot)})
    again = merge(listed, tmp_path / "listed", MergeOptions(quiet=True, copy_tokenizer=False, device="cpu"))
    assert all(torch.equal(again[name], tensor) for name, tensor in merged.items())


def test_filters_and_gradients(models, tmp_path):
    pivot, targets = models
    config = recipe(pivot, targets, select_topk=[{"filter": "mlp", "value": [0.2, 1.0]}, {"value": 0.9}])
    config["models"][0]["parameters"] = {"weight": [{"filter": "self_attn", "value": 3.0}, {"value": 1.0}]}
    merged = merge(config, tmp_path / "out")
    base, moved = read(pivot), [read(target) for target in targets]
    for layer, tau in ((0, 0.2), (1, 0.6), (2, 1.0)):
        for name, topk, weights in (
            (f"model.layers.{layer}.mlp.up_proj.weight", tau, None),
            (f"model.layers.{layer}.self_attn.q_proj.weight", 0.9, [3.0, 1.0, 1.0]),
        ):
            expected = kernel.sce_merge(base[name], [m[name] for m in moved], select_topk=topk, weights=weights)
            assert torch.equal(merged[name], expected), name


EMBEDDINGS_ALONE = [{"filter": "embed_tokens", "value": 0}, {"value": 0.3}]


@pytest.mark.parametrize(
    ("parameters", "left_alone"),
    [
        ({"select_topk": EMBEDDINGS_ALONE}, lambda name: "embed_tokens" in name),
        ({"select_topk": EMBEDDINGS_ALONE, "select_scope": "coefficients"}, lambda name: "embed_tokens" in name),
        ({"select_topk": 0}, lambda name: True),
        ({"select_topk": [0, 1]}, lambda name: ".layers.1." not in name and ".layers.2." not in name),
        ({"weight": EMBEDDINGS_ALONE}, lambda name: "embed_tokens" in name),
        ({"weight": 0}, lambda name: True),
    ],
    ids=["topk by filter", "topk by filter, coefficients", "topk", "topk by gradient", "weight by filter", "weight"],
)
def test_where_nothing_is_selected_or_weighed_the_pivot_stays(models, tmp_path, parameters, left_alone):
    pivot, targets = models
    merged, base = merge(recipe(pivot, targets, **parameters), tmp_path / "out"), read(pivot)
    assert {name for name in base if torch.equal(merged[name], base[name])} == {n for n in base if left_alone(n)}


@pytest.mark.parametrize("method", ["sce", "varm"])
def test_a_narrow_dtype_rounds_the_result_and_not_the_inputs(method, tmp_path):
    pivot, targets = write_family(tmp_path / "m", scales=(4e-5, 6e-5, 8e-5))
    config = recipe(pivot, targets, method)
    exact = merge(config, tmp_path / "exact")
    assert exact["lm_head.weight"].dtype == torch.float32
    for changes in ({"dtype": "bfloat16"}, {"dtype": "bfloat16", "out_dtype": "bfloat16"}, {"out_dtype": "bfloat16"}):
        merged = merge(config | changes, tmp_path / "-".join([*changes, *changes.values()]))
        assert all(torch.equal(merged[name], tensor.bfloat16()) for name, tensor in exact.items()), changes
    kept = merge(config | {"dtype": "bfloat16", "out_dtype": "float32"}, tmp_path / "kept")
    assert all(torch.equal(kept[name], tensor) for name, tensor in exact.items())
    doubled = merge(config | {"dtype": "float64"}, tmp_path / "doubled")  # adds digits, so the inputs are cast
    inputs = [read(path)["lm_head.weight"].double() for path in (pivot, *targets)]
    computed = kernel.sce_merge if method == "sce" else kernel.varm_merge
    assert torch.equal(doubled["lm_head.weight"], computed(inputs[0], inputs[1:]))


def test_bfloat16_inputs_are_rounded_once_to_out_dtype(tmp_path):
    pivot, targets = write_family(tmp_path / "m", dtype=torch.bfloat16)
    config = {key: value for key, value in recipe(pivot, targets).items() if key != "dtype"}
    inputs = [read(path) for path in (pivot, *targets)]
    kept = merge(config, tmp_path / "kept")
    merged = merge(config | {"out_dtype": "float32"}, tmp_path / "out")
    for name in inputs[0]:
        stored = [tensors[name] for tensors in inputs]
        assert torch.equal(merged[name], kernel.sce(stored[0], stored[1:], dtype=torch.float32).merged)
        assert torch.equal(kept[name], kernel.sce_merge(stored[0], stored[1:]))


def test_float64_checkpoints_are_merged(tmp_path):
    pivot, targets = write_family(tmp_path / "m", dtype=torch.float64)
    inputs = [read(path)["lm_head.weight"] for path in (pivot, *targets)]
    for dtype in ("float64", "float32"):
        merged = merge(recipe(pivot, targets) | {"dtype": dtype}, tmp_path / dtype)["lm_head.weight"]
        assert torch.equal(merged, kernel.sce(inputs[0], inputs[1:], dtype=getattr(torch, dtype)).merged)


@pytest.mark.parametrize("stored", [torch.bfloat16, torch.float64])
@pytest.mark.parametrize("changes", [{"dtype": "float32"}, {"dtype": "bfloat16"}, {"out_dtype": "float32"}], ids=str)
def test_a_vocabulary_is_averaged_and_padded_in_float32_or_better(stored, changes, tmp_path):
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    pivot, targets = write_family(tmp_path / "m", dtype=stored)
    for path in (pivot, *targets):  # the pivot lacks the last token: it gets the targets' mean
        words = {f"w{index}": index for index in range(30 if path == pivot else 31)}
        tokenizer = Tokenizer(models.WordLevel(words, unk_token="w0"))
        PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="w0").save_pretrained(path)
    config = recipe(pivot, targets) | {"tokenizer": {"source": "union", "pad_to_multiple_of": 32}, "dtype": None}
    merged = merge(config | changes, tmp_path / "out")["lm_head.weight"]
    wide = torch.promote_types(stored, torch.float32)
    base, *moved = (read(path)["lm_head.weight"].to(wide)[:31] for path in (pivot, *targets))
    base[30] = sum(tensor[30] for tensor in moved) / len(moved)
    base, *moved = (torch.cat([tensor, tensor.mean(0, keepdim=True)]) for tensor in (base, *moved))
    dtype = getattr(torch, next(iter(changes.values())))
    assert torch.equal(merged, kernel.sce(base, moved, dtype=dtype).merged)


def test_other_methods_of_mergekit_read_as_before(tmp_path):
    pivot, targets = write_family(tmp_path / "m")
    config = recipe(pivot, targets, "linear", weight=1.0) | {"dtype": "bfloat16"}
    config["models"] = config["models"][:1]
    del config["base_model"]
    merged = merge(config, tmp_path / "out")
    assert all(torch.equal(merged[name], tensor.bfloat16()) for name, tensor in read(targets[0]).items())


def test_an_embedding_that_the_tokenizer_permutes_is_read_as_stored(tmp_path):
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    pivot, targets = write_family(tmp_path / "m")
    for path in (pivot, *targets):
        words = models.WordLevel({f"word{index}": index for index in range(32)}, unk_token="word0")
        PreTrainedTokenizerFast(tokenizer_object=Tokenizer(words)).save_pretrained(path)
    config = recipe(pivot, targets) | {"tokenizer": {"source": "base"}}
    exact, narrow = (merge(config | {"dtype": d}, tmp_path / d) for d in ("float32", "bfloat16"))
    assert torch.equal(narrow["model.embed_tokens.weight"], exact["model.embed_tokens.weight"].bfloat16())


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2, torch.int8])
@pytest.mark.parametrize("recipe_dtype", ["bfloat16", "float64", None])
def test_quantised_targets_are_refused_while_mergekit_plans(dtype, recipe_dtype, models, tmp_path):
    pivot, targets = models
    name = "model.layers.1.mlp.up_proj.weight"
    weights = read(targets[1])
    weights[name] = (weights[name] * 100).to(dtype)
    damaged = write_llama(tmp_path / "narrow", weights, layers=3)
    stored = {torch.float8_e4m3fn: "F8_E4M3", torch.float8_e5m2: "F8_E5M2", torch.int8: "I8"}[dtype]
    with pytest.raises(ValueError, match=rf"model .*narrow for sce: expected float32.*got {stored} in {name}"):
        merge(recipe(pivot, [targets[0], damaged]) | {"dtype": recipe_dtype}, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_quantised_checkpoint_is_known_by_its_config(models, tmp_path):
    pivot, targets = models
    weights = read(targets[1])
    settings = {"quantization_config": {"quant_method": "gptq", "bits": 4}}
    shutil.copytree(targets[1], tmp_path / "whole")
    change_config(tmp_path / "whole", **settings)  # left over in a model that is whole again
    merge(recipe(pivot, [targets[0], tmp_path / "whole"]), tmp_path / "merged")
    weights["model.layers.0.mlp.up_proj.qweight"] = torch.zeros(2, 2, dtype=torch.int32)
    change_config(write_llama(tmp_path / "gptq", weights, layers=3), **settings)
    with pytest.raises(
        ValueError, match=r"model .*gptq for sce: .*got quantization_config \(gptq\) in its config.json"
    ):
        merge(recipe(pivot, [targets[0], tmp_path / "gptq"]), tmp_path / "out")


def test_a_missing_output_layer_is_refused_where_it_is_not_shared(models, tmp_path):
    pivot, targets = models
    weights = read(targets[1])
    del weights["lm_head.weight"]
    headless = write_llama(tmp_path / "headless", weights, layers=3)
    with pytest.raises(ValueError, match=r"model .*headless: expected lm_head.weight, as .*false, got none"):
        merge(recipe(pivot, [targets[0], headless]), tmp_path / "out")
    change_config(headless, tie_word_embeddings=True)  # then it is the embeddings
    merged = merge(recipe(pivot, [targets[0], headless]), tmp_path / "tied")
    inputs = [read(targets[0])["lm_head.weight"], weights["model.embed_tokens.weight"]]
    assert torch.equal(merged["lm_head.weight"], kernel.sce_merge(read(pivot)["lm_head.weight"], inputs))


@pytest.mark.parametrize("lacking", ["pivot", "all"])
def test_a_missing_output_layer_of_the_pivot_is_refused(lacking, models, tmp_path):
    pivot, *targets = (
        write_llama(
            tmp_path / path.name,
            {name: tensor for name, tensor in read(path).items() if name != "lm_head.weight"},
            layers=3,
        )
        for path in (models[0], *models[1])
    )
    config = recipe(pivot, targets if lacking == "all" else models[1])
    with pytest.raises(ValueError, match=r"model .*: expected lm_head.weight, as .*false, got none"):
        merge(config, tmp_path / "out")
    for path in (pivot, *targets):
        change_config(path, tie_word_embeddings=True)
    assert "model.embed_tokens.weight" in merge(config, tmp_path / "tied")


@pytest.mark.parametrize("untied", ["target", "pivot", "none"])
def test_an_output_layer_that_the_pivot_ties_is_a_warning(untied, models, tmp_path, caplog):
    paths = []
    for path in (models[0], *models[1]):
        own = untied == ("pivot" if path == models[0] else "target")
        weights = {name: tensor for name, tensor in read(path).items() if own or name != "lm_head.weight"}
        paths.append(change_config(write_llama(tmp_path / path.name, weights, layers=3), tie_word_embeddings=not own))
    merged = merge(recipe(paths[0], paths[1:]), tmp_path / "out")
    assert ("lm_head.weight" in merged) == (untied != "none")
    assert ("Set tie_word_embeddings: false in" in caplog.text) == (untied == "target")


@pytest.mark.parametrize("spelling", ["slash", "link", "pivot"])
def test_a_target_under_two_names_is_refused(spelling, models, tmp_path):
    pivot, targets = models
    (tmp_path / "link").symlink_to(targets[0])
    other = {"slash": f"{targets[0]}/", "link": str(tmp_path / "link"), "pivot": f"{pivot}/."}[spelling]
    config = recipe(pivot, targets)
    config["models"].append({"model": other})
    with pytest.raises(
        ValueError, match=r"inputs for sce.*: expected each model once, got .* and .*, which are the same model"
    ):
        merge(config, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("method", ["sce", "varm"])
@pytest.mark.parametrize("count", [1, 3])
def test_a_result_beyond_float16_is_an_error(method, count, models, tmp_path):
    pivot, targets = models
    name = "model.layers.1.mlp.up_proj.weight"
    large = []
    for path in targets[:count]:
        weights = read(path)
        weights[name][0, 0] = 1e5
        large.append(write_llama(tmp_path / path.name, weights, layers=3))
    config = recipe(pivot, large, method)
    with pytest.raises(ValueError, match=rf"result for tensor {name}: expected numbers within float16"):
        merge(config | {"out_dtype": "float16"}, tmp_path / "out")
    merged = merge(config | {"out_dtype": "bfloat16"}, tmp_path / "wide")
    assert merged[name].isfinite().all()


def test_a_target_of_weight_0_still_votes_with_sce():
    pivot, first, second = torch.zeros(1), torch.tensor([1.0]), torch.tensor([-2.0])
    assert merge_tensors([pivot, first], sce, base_index=0).item() == 1
    assert merge_tensors([pivot, first, second], sce, base_index=0, parameters={"weight": [1, 0]}).item() == 0
    with pytest.raises(ValueError, match=r"got -1\. To leave a target out, remove it"):
        merge_tensors([pivot, first, second], sce, base_index=0, parameters={"weight": [1, -1]})


def test_a_target_given_twice_is_named(models, tmp_path):
    pivot, targets = models
    with pytest.raises(ValueError, match=r"inputs for sce, default.*expected each model once, got .*target1 twice"):
        merge(recipe(pivot, [*targets, targets[1]]), tmp_path / "out")


def test_parameters_of_other_recipes_are_one_log_line_each(models, tmp_path, caplog):
    pivot, targets = models
    plain, weighted = (merge(recipe(pivot, targets), tmp_path / "plain"), recipe(pivot, targets))
    for entry, weight in zip(weighted["models"], (0.2, 0.6, 0.2)):
        entry["parameters"] = {"weight": weight}
    for run in range(2):
        caplog.clear()
        ignored = merge(recipe(pivot, targets, normalize=True, int8_mask=True), tmp_path / f"ignored{run}")
        for word in ("normalize", "int8_mask"):
            assert caplog.text.count(f"{word} has no effect on sce") == 1
        assert all(torch.equal(ignored[name], tensor) for name, tensor in plain.items())
        merge(weighted, tmp_path / f"weighted{run}")
        assert caplog.text.count("weight multiplies the coefficient that sce computes") == 1
        assert "target1 0.6" in caplog.text
    caplog.clear()
    merge(recipe(pivot, targets, weight=0.2, normalize=False), tmp_path / "equal")
    assert "weight multiplies" not in caplog.text
    assert "has no effect" not in caplog.text


def test_varm_and_out_dtype(models, tmp_path):
    pivot, targets = models
    config = recipe(pivot, targets, "varm", granularity=[{"filter": "mlp", "value": "element"}, {"value": "matrix"}])
    merged = merge(config | {"dtype": "bfloat16", "out_dtype": "float32"}, tmp_path / "out")
    base, moved = read(pivot), [read(target) for target in targets]
    for name, granularity in (("model.layers.1.mlp.up_proj.weight", "element"), ("lm_head.weight", "matrix")):
        expected = kernel.varm_merge(base[name], [m[name] for m in moved], granularity=granularity)
        assert torch.equal(merged[name], expected)


def test_sliced_configuration(models, tmp_path):
    pivot, targets = models
    sources = [pivot, *targets]
    slices = [
        {"sources": [{"model": str(s), "layer_range": span} for s in sources]} for span in ([0, 1], [2, 3], [1, 2])
    ]
    config = {"merge_method": "sce", "base_model": str(pivot), "slices": slices, "dtype": "float32"}
    merged = merge(config, tmp_path / "out")
    base, moved = read(pivot), [read(target) for target in targets]
    for out, source in ((0, 0), (1, 2), (2, 1)):
        name = "model.layers.{}.mlp.down_proj.weight"
        expected = kernel.sce_merge(base[name.format(source)], [m[name.format(source)] for m in moved])
        assert torch.equal(merged[name.format(out)], expected)
    slices[1]["sources"] = slices[1]["sources"][1:]
    with pytest.raises(ValueError, match=r"default.slices\[1\]: expected the pivot .*pivot among them"):
        merge(config, tmp_path / "none")


def test_mergekit_multi(models, tmp_path):
    from mergekit.scripts import multimerge

    pivot, targets = models
    first = recipe(pivot, targets[:2]) | {"name": "first"}
    second = recipe(pivot, [targets[2]], select_topk=1.0)
    second["models"].append({"model": "first"})
    (tmp_path / "multi.yml").write_text(yaml.safe_dump_all([first, second]))
    arguments = [str(tmp_path / "multi.yml"), "-I", str(tmp_path / "parts"), "--out-path", str(tmp_path / "out")]
    multimerge.main.main([*arguments, "--quiet", "--no-write-model-card"], standalone_mode=False)
    name = "model.layers.2.self_attn.v_proj.weight"
    base, *moved = (read(path)[name] for path in (pivot, *targets))
    inner = kernel.sce_merge(base, moved[:2])
    assert torch.equal(read(tmp_path / "parts" / "first")[name], inner)
    assert torch.allclose(read(tmp_path / "out")[name], kernel.sce_merge(base, [moved[2], inner]), rtol=0, atol=1e-9)


def test_adapters_are_inputs(models, tmp_path):
    peft = pytest.importorskip("peft")
    from transformers import LlamaForCausalLM

    pivot, targets = models
    model = LlamaForCausalLM.from_pretrained(pivot)
    settings = peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)
    adapted = peft.get_peft_model(model, settings)
    adapted.save_pretrained(tmp_path / "adapter")
    name = "model.layers.0.self_attn.q_proj.weight"
    expected = kernel.sce_merge(
        read(pivot)[name],
        [adapted.merge_and_unload().get_parameter(name).detach(), read(targets[0])[name]],
    )
    config = recipe(pivot, [targets[0]])
    config["models"].insert(0, {"model": f"{pivot}+{tmp_path / 'adapter'}"})
    options = MergeOptions(
        quiet=True, copy_tokenizer=False, write_model_card=False, lora_merge_cache=str(tmp_path / "c")
    )
    assert torch.allclose(merge(config, tmp_path / "out", options)[name], expected, rtol=0, atol=1e-7)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"parameters": {"select_topk": 1.7}}, r"select_topk for sce: expected a number in \[0, 1\], got 1.7"),
        ({"parameters": {"select_topk": [0.5, 2]}}, r"expected a number in \[0, 1\], got 2"),
        ({"parameters": {"select_scope": "none"}}, "expected all or coefficients, got 'none'"),
        ({"base_model": None}, r"base_model for sce, default.slices\[0\]: expected the pivot, got none"),
    ],
)
def test_bad_recipes_fail_while_mergekit_plans(models, tmp_path, change, message):
    pivot, targets = models
    with pytest.raises(ValueError, match=message) as caught:
        merge(recipe(pivot, targets) | change, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    assert "expected" in str(caught.value).splitlines()[-1]  # the last line of mergekit-yaml's traceback says it


def test_nan_is_named_with_tensor_and_model(models, tmp_path):
    pivot, targets = models
    broken = read(targets[1])
    broken["model.layers.1.mlp.up_proj.weight"][3, 3] = float("nan")
    damaged = write_llama(tmp_path / "damaged", broken, layers=3)
    with pytest.raises(ValueError, match=r"tensor model.layers.1.mlp.up_proj.weight of .*damaged: expected finite"):
        merge(recipe(pivot, [targets[0], damaged]), tmp_path / "out")


def test_a_weight_on_the_pivot_is_refused(models, tmp_path):
    pivot, targets = models
    config = recipe(pivot, targets)
    config["models"].append({"model": str(pivot), "parameters": {"weight": 0.5}})
    with pytest.raises(ValueError, match=r"weight for the pivot .*pivot: expected none, got 0.5"):
        merge(config, tmp_path / "out")
    merged = merge(recipe(pivot, targets, weight=0.5), tmp_path / "global")  # the same for all: no effect
    name = "lm_head.weight"
    expected = kernel.sce_merge(read(pivot)[name], [read(t)[name] for t in targets], weights=[0.5] * 3)
    assert torch.equal(merged[name], expected)
