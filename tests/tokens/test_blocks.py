"""Models that merge tokens between their blocks."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from lpvit_cli.errors import EnvironmentFault, UsageError
from lpvit_cli.models.build import build_model
from lpvit_cli.models.flops import count_flops
from lpvit_cli.models.folder import load_model, model_config, save_model
from lpvit_cli.models.merging import merge_tokens, merging_for, tokens_of_blocks, with_fraction
from lpvit_cli.recipe.model import FeaturesKind, ModelSection
from lpvit_cli.recipe.tokens import TokensSection
from lpvit_cli.tokens.blocks import Merging, merging_of

SMALL = {"depth": 3, "embed_dim": 24, "num_heads": 3, "img_size": 32, "patch_size": 4, "num_classes": 5}
SMALL_HF = {"num_hidden_layers": 3, "hidden_size": 24, "num_attention_heads": 3, "intermediate_size": 48, "image_size": 32}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "class token": ("vit_tiny_patch16_224", SMALL),
    "two class tokens": ("deit_tiny_distilled_patch16_224", SMALL),
    "registers": ("vit_small_patch14_reg4_dinov2", {**SMALL, "num_classes": 0}),
    "mean of patches": ("vit_tiny_patch16_224", {**SMALL, "class_token": False, "global_pool": "avg"}),
    "attention pooling": ("vit_base_patch16_siglip_224", {**SMALL, "num_classes": 0}),
    "transformers": ("transformers:ViTForImageClassification", {**SMALL_HF, "patch_size": 4, "num_labels": 5}),
    "class token and mean": ("transformers:Dinov2ForImageClassification", {**SMALL_HF, "patch_size": 4, "num_labels": 5}),
    "transformers' pooling": ("transformers:SiglipVisionModel", {**SMALL_HF, "patch_size": 4}),
}
RESTORED = {"mean of patches", "attention pooling", "class token and mean", "transformers' pooling"}


def made(which: str, features: FeaturesKind = "pooled") -> Any:
    name, kwargs = MODELS[which]
    task: Any = "features" if features == "tokens" else "auto"
    model: Any = build_model(ModelSection(name=name, kwargs=kwargs), task, features)
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator)
    return model


def images(count: int, size: int = 32) -> Tensor:
    return torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(1))


def in_pairs(count: int) -> Tensor:
    """Images whose patches of 4 pixels come in pairs of equal ones."""
    half = images(count).unflatten(3, (4, 2, 4))[:, :, :, :, :1]
    return half.expand(-1, -1, -1, -1, 2, -1).flatten(3)


def without_positions(model: Any) -> Any:
    for name, parameter in model.named_parameters():
        if "pos_embed" in name or "position_embedding" in name:
            parameter.data.zero_()
    return model


# the two heads of a distilled model have no tokens to give
@pytest.mark.parametrize(
    ("which", "features"),
    [(which, features) for which in MODELS for features in ("pooled", "tokens") if (which[:3], features) != ("two", "tokens")],
)
def test_merging_equal_tokens_changes_nothing(which: str, features: FeaturesKind) -> None:
    """A token of size two weighs in attention, and in every kind of pooling, what two equal tokens do."""
    model = without_positions(made(which, features)).double()
    merging = merging_for(model.float(), TokensSection(fraction=0.5, after=(0,)))
    merged = merge_tokens(model, merging).double()
    assert min(tokens_of_blocks(merged.float())) == max(tokens_of_blocks(merged)) - 32
    assert merging.restores == (which in RESTORED or features == "tokens")
    pairs = in_pairs(2).double()
    torch.testing.assert_close(merged.double()(pairs), model.double()(pairs), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("which", list(MODELS))
def test_names_states_and_the_given_model_stay(which: str) -> None:
    model = made(which)
    before = model(images(1))
    merged = merge_tokens(model, merging_for(model, TokensSection(fraction=0.2)))
    assert list(merged.state_dict()) == list(model.state_dict())
    assert [name for name, _ in merged.named_parameters()] == [name for name, _ in model.named_parameters()]
    assert merging_of(model) is None
    assert torch.equal(model(images(1)), before)
    assert not torch.equal(merged(images(1)), before)


def test_the_least_fraction_that_reaches_a_share_of_the_flops() -> None:
    model = made("class token")
    merging = merging_for(model, TokensSection(flops=0.7))
    dense = count_flops(model, ()).total

    def share(fraction: float) -> float:
        return count_flops(merge_tokens(model, with_fraction(merging, fraction)), ()).total / dense

    assert share(merging.fraction) <= 0.7 < share(merging.fraction - 0.02)
    assert merging.after == (0,)  # every second one of three, without the last
    with pytest.raises(UsageError, match=r"tokens\.flops: 0\.1 cannot be reached by merging: .* from 0\.\d+ to 1"):
        merging_for(model, TokensSection(flops=0.1))


@pytest.mark.parametrize(
    ("name", "kwargs", "reason"),
    [
        ("swin_tiny_patch4_window7_224", {"depths": (1, 1, 1, 1)}, "4 stages of blocks"),
        ("eva02_tiny_patch14_224", {"depth": 2}, "positions of all patches"),
        ("beit_base_patch16_224", {"depth": 2, "embed_dim": 48, "num_heads": 3}, "takes no mask"),
        ("naflexvit_base_patch16_gap", {"depth": 2, "embed_dim": 48, "num_heads": 3}, "still see all tokens"),
        ("transformers:BeitModel", {**SMALL_HF, "patch_size": 4}, "positions of all patches"),
    ],
)
def test_what_cannot_merge_is_refused_with_the_reason(name: str, kwargs: dict[str, Any], reason: str) -> None:
    model = build_model(ModelSection(name=name, kwargs=kwargs))
    with pytest.raises(UsageError, match=reason):
        merging_for(model, TokensSection(fraction=0.2))


def test_blocks_that_are_called_past_their_container_are_noticed() -> None:
    model = made("class token")
    model.set_grad_checkpointing()
    with pytest.raises(UsageError, match="still see all tokens"):
        merging_for(model, TokensSection(fraction=0.2))


def test_a_block_beyond_the_depth_is_refused() -> None:
    with pytest.raises(UsageError, match=r"tokens\.after: there is no block 3: this model has 3"):
        merging_for(made("class token"), TokensSection(fraction=0.2, after=(1, 3)))


@pytest.mark.parametrize("which", ["registers", "transformers"])
def test_a_folder_keeps_the_merging(which: str, tmp_path: Path) -> None:
    name, kwargs = MODELS[which]
    model = made(which)
    merged = merge_tokens(model, merging_for(model, TokensSection(fraction=0.25)))
    section = ModelSection(name=name, kwargs=kwargs)
    save_model(tmp_path / "model", merged, model_config(section, model))
    read = load_model(tmp_path / "model")
    assert merging_of(read) == merging_of(merged)
    assert torch.equal(read(images(2)), merged(images(2)))
    config = tmp_path / "model" / "config.json"
    config.write_text(config.read_text().replace('"fraction": 0.25', '"fraction": 0.75'))
    with pytest.raises(EnvironmentFault, match="tokens.fraction"):
        load_model(tmp_path / "model")


def test_a_copy_merges_as_the_model_does() -> None:
    model = made("transformers")
    merged = merge_tokens(model, merging_for(model, TokensSection(fraction=0.25)))
    assert torch.equal(copy.deepcopy(merged)(images(2)), merged(images(2)))


def test_the_graph_is_whole_and_waits_for_nothing() -> None:
    """What torch.compile and CUDA graphs need: no break, and no value that a shape depends on."""
    model = made("attention pooling")
    merged = merge_tokens(model, Merging(fraction=0.2, after=(0, 1), prefix=0, restores=True))
    seen: list[str] = []

    def backend(graph: torch.fx.GraphModule, example: Any) -> Any:
        seen.extend(str(node.target) for node in graph.graph.nodes)
        return graph.forward

    compiled = torch.compile(merged, backend=backend, fullgraph=True, dynamic=False)
    torch.testing.assert_close(compiled(images(2)), merged(images(2)))
    assert not {"item", "nonzero"} & {*seen}
    assert any("topk" in name for name in seen)


def test_deep_models_merge_until_nothing_is_left_to_merge() -> None:
    kwargs = {**SMALL, "depth": 24, "embed_dim": 12}
    model = build_model(ModelSection(name="vit_tiny_patch16_224", kwargs=kwargs))
    merged = merge_tokens(model, merging_for(model, TokensSection(fraction=0.5)))
    assert tokens_of_blocks(merged)[-1] == 2
    assert 0 < merging_for(model, TokensSection(flops=0.7)).fraction < 0.2


def test_one_block_alone_has_nothing_to_save() -> None:
    model = build_model(ModelSection(name="vit_tiny_patch16_224", kwargs={**SMALL, "depth": 1}))
    with pytest.raises(UsageError, match="has one block"):
        merging_for(model, TokensSection(flops=0.9))


def test_a_second_merging_takes_the_place_of_the_first() -> None:
    model = made("class token")
    first = merge_tokens(model, Merging(fraction=0.2, after=(0,), prefix=1, restores=False))
    second = Merging(fraction=0.3, after=(1,), prefix=1, restores=False)
    assert tokens_of_blocks(merge_tokens(first, second)) == tokens_of_blocks(merge_tokens(model, second))


def test_a_new_head_of_zeros_hides_no_pooling() -> None:
    model = made("mean of patches")
    torch.nn.init.zeros_(model.head.weight)
    assert merging_for(model, TokensSection(fraction=0.2)).restores


def test_models_of_any_type_merge() -> None:
    model = made("attention pooling").bfloat16()
    assert merging_for(model, TokensSection(fraction=0.2)).restores


def test_after_the_last_block_nothing_is_left_to_save() -> None:
    with pytest.raises(UsageError, match="2 is the last block"):
        merging_for(made("class token"), TokensSection(fraction=0.2, after=(2,)))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU: torch sees no CUDA device")
@pytest.mark.parametrize("compiled", [False, True])
def test_a_cuda_graph_replays_it_for_other_images(compiled: bool) -> None:
    model = made("attention pooling")
    merged = merge_tokens(model, Merging(fraction=0.2, after=(0, 1), prefix=0, restores=True)).cuda()
    call: Any = torch.compile(merged, dynamic=False) if compiled else merged
    held, aside = images(2).cuda(), torch.cuda.Stream()
    with torch.inference_mode(), torch.cuda.stream(aside):
        for _ in range(3):
            call(held)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.inference_mode(), torch.cuda.graph(graph):
        given = call(held)
    other = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(7)).cuda()
    held.copy_(other)
    graph.replay()
    torch.testing.assert_close(given, merged(other), rtol=1e-3, atol=1e-3)
