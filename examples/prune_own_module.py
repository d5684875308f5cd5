"""Prune a hand-written module that gives features, judged by its features.

python examples/prune_own_module.py
"""

import torch
from torch import Tensor, nn

import lpvit_cli as lpvit


class Mixer(nn.Module):
    """Tokens [n, tokens, 48] -> features [n, 32]."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(48, 128)
        self.hidden = nn.Linear(128, 256)
        self.back = nn.Linear(256, 128)
        self.out = nn.Linear(128, 32)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        x = x + self.back(torch.relu(self.hidden(x)))
        return self.out(x.mean(dim=1))


torch.manual_seed(0)
model = Mixer().eval()
batches = [torch.randn(16, 20, 48) for _ in range(6)]

pruned = lpvit.prune(model, batches, flops=0.5, block=(32, 16), task="features", layers=["hidden", "back"])
pruned = lpvit.recover(pruned, teacher=model, images=batches, epochs=3, task="features", method="full", lr=3e-4)

with torch.no_grad():
    x = torch.randn(64, 20, 48)
    cosine = torch.cosine_similarity(pruned(x), model(x), dim=1).mean()
kept = {name: f"{layer.weight.density:.0%}" for name, layer in lpvit.sparse_layers(pruned).items()}
print(f"kept blocks: {kept}; mean cosine to the dense features {cosine:.4f}")
