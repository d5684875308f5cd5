"""Prune, recover and export torchvision's ViT from Python, without a recipe.

    python examples/prune_torchvision.py

The model is small and random, and so are the images: put your own in their places (weights="DEFAULT", a DataLoader).
"""

import torch
from torchvision.models import VisionTransformer

import lpvit_cli as lpvit

torch.manual_seed(0)
model = VisionTransformer(image_size=32, patch_size=8, num_layers=2, num_heads=4, hidden_dim=64, mlp_dim=256, num_classes=10)
torch.nn.init.normal_(model.heads.head.weight, std=0.1)  # torchvision starts it at zero
images = torch.randn(96, 3, 32, 32)

# attention of torch reads its weights without calling their layers, so that the MLPs are what can be pruned
pruned = lpvit.prune(model, images, sparsity=0.5, block=(32, 16))
pruned = lpvit.recover(pruned, teacher=model, images=images, epochs=2, rank=4)
file = lpvit.export_onnx(pruned, images[:1], "vit_pruned.onnx")

model.eval()
with torch.no_grad():
    same = (pruned(images).argmax(dim=1) == model(images).argmax(dim=1)).float().mean()
print(f"same class for {same:.0%} of the images; {file.path}: {file.bytes / 1024:.0f} KiB, error {file.relative_error:.0e}")
