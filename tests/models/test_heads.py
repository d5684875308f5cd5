"""The heads that recovery may train, of models that have two."""

from __future__ import annotations

from hf import VIT

from lpvit_cli.models.build import build_model
from lpvit_cli.recipe.finetune import FinetuneSection
from lpvit_cli.recipe.model import ModelSection
from lpvit_cli.recovery.start import choose_trained

HEAD = FinetuneSection.model_validate({"also_train": ["head"]})


def trained(section: ModelSection) -> set[str]:
    model = build_model(section)
    choose_trained(model, HEAD)
    return {name.removesuffix(".weight") for name, p in model.named_parameters() if p.requires_grad and p.ndim == 2}


def test_both_heads_of_distilled_models() -> None:
    kwargs = {"img_size": 32, "depth": 1, "num_classes": 5}
    timms = ModelSection(name="deit_tiny_distilled_patch16_224", kwargs=kwargs)
    assert trained(timms) == {"head", "head_dist"}
    theirs = {**VIT, "num_labels": 5}
    one = ModelSection(name="transformers:DeiTForImageClassification", kwargs=theirs)
    assert trained(one) == {"model.classifier"}
    two = ModelSection(name="transformers:DeiTForImageClassificationWithTeacher", kwargs=theirs)
    assert trained(two) == {"model.cls_classifier", "model.distillation_classifier"}
