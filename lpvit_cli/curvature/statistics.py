"""Per-layer statistics of the dense model on the calibration images, and their file.

Sums are kept, not averages, with the counts they are sums over: partial statistics add up.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from lpvit_cli import distributed
from lpvit_cli.errors import EnvironmentFault
from lpvit_cli.files import parse_json, reason
from lpvit_cli.models.tensors import write_tensors

WEIGHTS = "weights"  # in the metadata of files: fingerprints of the layers that the statistics are of
FIELDS = {  # and what they are called in files
    "A": "input_outer",
    "G": "output_outer",
    "gradient": "gradient",
    "weighted": "input_outer_by_gradient",
}
PLAIN = 0.1  # share of the plain H in the one that weighs tokens


@dataclass
class LayerStatistics:
    """Statistics of one linear layer, W [out, in], x [tokens, in], per-image loss gradient d [tokens, out]; float32.

    `A` and `G` are the Kronecker factors of K-FAC (arXiv 1503.05671), as sums.
    """

    A: Tensor  # [in, in]: sum over tokens of x^T x
    G: Tensor  # [out, out]: sum over tokens of d^T d, for a loss summed (not averaged) over images
    gradient: Tensor  # [out, in]: sum over images of dL/dW = sum over tokens of d^T x
    weighted: Tensor  # [in, in]: sum over tokens of |d|^2 x^T x
    tokens: int  # tokens summed over, all images together
    images: int

    def __add__(self, other: LayerStatistics) -> LayerStatistics:
        """Statistics of both sets of images together, as if one process had seen them."""
        sums = {field: getattr(self, field) + getattr(other, field) for field in FIELDS}
        return LayerStatistics(**sums, tokens=self.tokens + other.tokens, images=self.images + other.images)

    def select(self, dim: int, index: Tensor) -> LayerStatistics:
        """Those of a layer with the rows (`dim` 0) or columns (1) of W at `index` only, in that order."""
        index = index.to(self.A.device)
        squares = ("G",) if dim == 0 else ("A", "weighted")
        chosen = {field: getattr(self, field)[index[:, None], index] for field in squares}
        return replace(self, gradient=self.gradient.index_select(dim, index), **chosen)

    def sum_over_processes(self) -> None:
        """Statistics of all processes together, in place."""
        counts = torch.tensor([self.tokens, self.images])
        distributed.all_reduce(*(getattr(self, field) for field in FIELDS), counts)
        self.tokens, self.images = counts.tolist()

    @property
    def hessian(self) -> Tensor:
        """H = 2/N sum x^T x [in, in], N tokens: Hessian of the layer's mean squared error, the same for each output."""
        return self.A * (2 / self.tokens)

    @property
    def token_hessian(self) -> Tensor:
        """H [in, in] as `hessian`, but each token weighs as much as the loss depends on it: |d|^2, in a mean of one. A share
        PLAIN of the plain one stays, for tokens that the loss of few images does not see."""
        weight = self.G.trace()
        if not weight > 0:
            return self.hessian
        return (self.weighted * (2 / weight) + PLAIN * self.hessian) / (1 + PLAIN)

    @property
    def output_moment(self) -> Tensor:
        """S = 1/N sum d^T d [out, out]: output-gradient second moment."""
        return self.G / self.tokens

    @property
    def mean_gradient(self) -> Tensor:
        """g [out, in]: dL/dW averaged over images."""
        return self.gradient / self.images

    @property
    def loss_weights(self) -> Tensor:
        """T S [out, out], T tokens an image: what errors of the outputs, their products averaged over tokens, cost in loss
        per image; with H / 2 the layer's Fisher matrix, Kronecker-factored."""
        return self.tokens_per_image * self.output_moment

    @property
    def not_finite(self) -> str | None:
        """A field that holds NaN or infinite values."""
        return next((stored for field, stored in FIELDS.items() if not bool(getattr(self, field).isfinite().all())), None)

    def to(self, device: torch.device) -> LayerStatistics:
        return LayerStatistics(**{f: getattr(self, f).to(device) for f in FIELDS}, tokens=self.tokens, images=self.images)

    @property
    def tokens_per_image(self) -> float:
        return self.tokens / self.images


def save_statistics(path: Path, statistics: dict[str, LayerStatistics], layers: Mapping[str, nn.Linear]) -> None:
    """`layers`: those that the statistics are of, by name."""
    tensors: dict[str, Tensor] = {}
    for name, layer in statistics.items():
        tensors |= {f"{name}.{stored}": getattr(layer, field).contiguous() for field, stored in FIELDS.items()}
        tensors[f"{name}.counts"] = torch.tensor([layer.tokens, layer.images])
    prints = {name: _fingerprint(layers[name]) for name in statistics}
    write_tensors(path, tensors, {WEIGHTS: json.dumps(prints)})


def load_statistics(path: Path, layers: Mapping[str, nn.Linear]) -> dict[str, LayerStatistics]:
    """Of the layers, by name; raises EnvironmentFault when the file is damaged, lacks one, or is of other weights."""
    again = "run `lpvit calibrate --no-resume`"
    try:
        with safe_open(path, "pt") as file:
            statistics = {}
            prints = parse_json((file.metadata() or {}).get(WEIGHTS, "{}"))  # none in files of lpvit 0.2
            for name, layer in layers.items():
                tokens, images = _counts(name, file.get_tensor(f"{name}.counts"))
                if prints and prints[name] != _fingerprint(layer):
                    raise EnvironmentFault(
                        f"{path}: statistics are of another model, or of one in another order: the weights of {name} differ",
                        again,
                    )
                fields = {field: file.get_tensor(f"{name}.{stored}") for field, stored in FIELDS.items()}
                _require_shapes(name, fields, layer)
                statistics[name] = LayerStatistics(**fields, tokens=tokens, images=images)
                if field := statistics[name].not_finite:
                    raise ValueError(f"{field} of {name} holds NaN or infinite values")
            return statistics
    except (SafetensorError, OSError, ValueError, KeyError, TypeError) as error:
        raise EnvironmentFault(f"{path}: unreadable statistics: {reason(error)}", again) from error


def _counts(name: str, counts: Tensor) -> tuple[int, int]:
    """Tokens and images of a layer. Raises ValueError where sums over so many cannot be averaged."""
    if counts.dtype != torch.int64 or counts.shape != (2,) or not bool((counts > 0).all()):
        raise ValueError(f"{name}.counts are no numbers of tokens and images")
    tokens, images = counts.tolist()
    return tokens, images


def _require_shapes(name: str, fields: Mapping[str, Tensor], layer: nn.Linear) -> None:
    """Raise ValueError where sums are not those of such a layer."""
    out, columns = layer.weight.shape
    shapes = {"A": (columns, columns), "G": (out, out), "gradient": (out, columns), "weighted": (columns, columns)}
    for field, shape in shapes.items():
        found = fields[field]
        if found.shape != shape or found.dtype != torch.float32:
            raise ValueError(
                f"{name}.{FIELDS[field]} is {found.dtype} {list(found.shape)}, the layer needs {torch.float32} {list(shape)}"
            )


def _fingerprint(layer: nn.Linear) -> str:
    return hashlib.sha256(layer.weight.detach().float().cpu().contiguous().numpy().tobytes()).hexdigest()
