"""A device profile: what one device takes for each prunable layer of a model, by the fraction of its blocks kept.

Times were measured on that device, energies too or by its power model; between fractions they are interpolated. Layers are
timed one by one, their weights in the cache where it holds them: what a whole model takes beyond its prunable layers is
`rest_ms`.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import numpy as np
import torch
from lpvit_kernels.home import cache_folder
from pydantic import BaseModel, ConfigDict, Field, PositiveInt, ValidationError, computed_field, model_validator
from torch import Tensor

from lpvit_cli.errors import EnvironmentFault, UsageError
from lpvit_cli.files import read_json, reason
from lpvit_cli.measure.energy.power import PowerModel, Work

FORMAT, FORMAT_VERSION = "lpvit-profile", 2
KEPT = (0.05, 0.1, 0.25, 0.5, 0.75, 1.0)  # fractions of blocks that are measured, to the nearest whole block
PROFILE_FILE = "profile.json"  # in a run folder
PROFILES = "profiles"  # in the cache folder
AGAIN = "make it again: lpvit profile RECIPE"
Cost = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Kept = Annotated[float, Field(gt=0, le=1)]
Shape = tuple[PositiveInt, PositiveInt]


class SparseProfile(BaseModel):
    """A layer with blocks of one size: milliseconds and millijoules per call at ascending fractions of blocks kept."""

    model_config = ConfigDict(frozen=True)

    block: Shape  # output features x input features
    kept: Annotated[list[Kept], Field(min_length=1)]
    ms: list[Cost]
    mj: list[Cost] | None  # None: not measured

    @model_validator(mode="after")
    def _is_a_curve(self) -> Self:
        if any(len(costs) != len(self.kept) for costs in (self.ms, self.mj) if costs is not None):
            raise ValueError("kept, ms and mj differ in length")
        if any(after <= before for before, after in zip(self.kept, self.kept[1:], strict=False)):
            raise ValueError("kept must ascend")
        return self

    def times(self, share: float) -> SparseProfile:
        """The same with all costs that many times as high."""
        mj = None if self.mj is None else [share * cost for cost in self.mj]
        return self.model_copy(update={"ms": [share * cost for cost in self.ms], "mj": mj})

    def break_even(self, dense_ms: float) -> float | None:
        """The largest kept fraction at which this takes no longer than `dense_ms`; None: at no measured one."""
        for n in reversed(range(len(self.ms))):
            if self.ms[n] <= dense_ms:
                return float(np.interp(dense_ms, self.ms[n : n + 2], self.kept[n : n + 2]))
        return None


class LayerProfile(BaseModel):
    """All layers of one shape that see the same number of rows, as nn.Linear and block-sparse; costs per call of one."""

    model_config = ConfigDict(frozen=True)

    shape: Shape  # out, in
    rows: PositiveInt  # of x, for a whole batch
    bias: bool
    names: Annotated[list[str], Field(min_length=1)]
    dense_ms: Cost
    dense_mj: Cost | None
    sparse: list[SparseProfile]

    def work(self, kept: float, value_bytes: int) -> Work:
        """Of a call with a fraction of the blocks kept."""
        out, columns = self.shape
        weights = kept * out * columns
        moved = weights + out * self.bias + self.rows * (columns + out)
        return Work(round(self.rows * weights), round(value_bytes * moved))


class DeviceProfile(BaseModel):
    """`model_ms` and `model_mj` are of one call of the whole dense model on `batch_size` images; mj None: not measured."""

    model_config = ConfigDict(frozen=True, protected_namespaces=())

    format: Literal["lpvit-profile"] = "lpvit-profile"
    format_version: Literal[2] = 2
    device: str
    dtype: Annotated[str, Field(pattern="^(bfloat16|float(16|32|64))$")]
    threads: PositiveInt  # CPU threads
    model: str
    batch_size: PositiveInt
    provenance: dict[str, Any]
    model_ms: Cost
    model_mj: Cost | None
    model_work: Work
    power: PowerModel | None = None  # None: energies are as measured
    energy_source: str | None
    energy_reasons: list[str]  # why there is no energy
    layers: list[LayerProfile]

    @computed_field  # type: ignore[prop-decorator]
    @property
    def rest_ms(self) -> float:
        """Milliseconds per call outside the prunable layers; 0 where the layers one by one take longer than the model."""
        return max(0.0, self.model_ms - sum(len(layer.names) * layer.dense_ms for layer in self.layers))

    @computed_field  # type: ignore[prop-decorator]
    @property
    def rest_mj(self) -> float | None:
        """Millijoules per call outside the prunable layers, as `rest_ms`; None: not measured."""
        layers = [(len(layer.names), layer.dense_mj) for layer in self.layers]
        if self.model_mj is None or any(mj is None for _, mj in layers):
            return None
        return max(0.0, self.model_mj - sum(count * mj for count, mj in layers if mj is not None))

    def with_power(self, power: PowerModel, source: str) -> DeviceProfile:
        """The same times, and by a power model what energy goes with them."""

        def millijoules(ms: float, work: Work) -> float:
            return 1e3 * power.joules(work, ms / 1e3)

        def with_energy(layer: LayerProfile) -> LayerProfile:
            size = getattr(torch, self.dtype).itemsize
            sparse = [
                one.model_copy(
                    update={"mj": [millijoules(ms, layer.work(k, size)) for k, ms in zip(one.kept, one.ms, strict=True)]}
                )
                for one in layer.sparse
            ]
            return layer.model_copy(update={"dense_mj": millijoules(layer.dense_ms, layer.work(1.0, size)), "sparse": sparse})

        return self.model_copy(
            update={
                "model_mj": millijoules(self.model_ms, self.model_work),
                "power": power,
                "energy_source": source,
                "energy_reasons": [],
                "layers": [with_energy(layer) for layer in self.layers],
            }
        )

    def with_rows(self, rows: Mapping[str, int], rest: float) -> DeviceProfile:
        """What it would say of a model whose layers see other `rows` of x, by name: costs in proportion; and what is outside of
        them `rest` times what it was."""
        layers = []
        for layer in self.layers:
            for seen in sorted({rows[name] for name in layer.names}):
                names, share = [name for name in layer.names if rows[name] == seen], seen / layer.rows
                sparse = [one.times(share) for one in layer.sparse]
                costs = {"dense_ms": layer.dense_ms * share, "dense_mj": layer.dense_mj and layer.dense_mj * share}
                layers.append(layer.model_copy(update={"rows": seen, "names": names, "sparse": sparse, **costs}))
        bare = self.model_copy(update={"layers": layers})
        ms = rest * self.rest_ms + sum(layer.dense_ms * len(layer.names) for layer in layers)
        mj = None if self.rest_mj is None else rest * self.rest_mj + sum((one.dense_mj or 0) * len(one.names) for one in layers)
        return bare.model_copy(update={"model_ms": ms, "model_mj": mj})

    def linear_ms(self, shape: tuple[int, int], rows: int, block: tuple[int, int], kept: Tensor) -> Tensor:
        """Milliseconds per call of a layer `shape` (out, in) on `rows` rows of x, at each fraction of blocks `kept`.

        kept [...] -> float64 [...] on the CPU: linear between measured fractions, constant beyond them; at exactly 1 the
        layer stays an nn.Linear. Raises UsageError when the profile has no such layer or block.
        """
        layer, sparse = self._find(shape, rows, block)
        return _between(kept, sparse.kept, sparse.ms, layer.dense_ms)

    def linear_mj(self, shape: tuple[int, int], rows: int, block: tuple[int, int], kept: Tensor) -> Tensor:
        """Millijoules per call, as `linear_ms`. Raises UsageError also when energy was not measured."""
        layer, sparse = self._find(shape, rows, block)
        if layer.dense_mj is None or sparse.mj is None:
            raise UsageError(
                f"the profile of {self.device} has no energy: {'; '.join(self.energy_reasons) or 'not measured'}",
                "use a latency budget, or profile a device whose meter can be read (see: lpvit doctor)",
            )
        return _between(kept, sparse.kept, sparse.mj, layer.dense_mj)

    def _find(self, shape: tuple[int, int], rows: int, block: tuple[int, int]) -> tuple[LayerProfile, SparseProfile]:
        for layer in self.layers:
            for sparse in layer.sparse:
                if (layer.shape, layer.rows, sparse.block) == (shape, rows, block):
                    return layer, sparse
        (out, columns), (height, width) = shape, block
        raise UsageError(
            f"the profile of {self.device} has no layer of {out}x{columns} (out x in) on {rows} rows with blocks of "
            f"{height}x{width}",
            "profile with the same model, prune.block and batch size: lpvit profile RECIPE --batch-size N",
        )

    def save(self, path: Path) -> None:
        path.write_text(self.model_dump_json(indent=1) + "\n")

    @classmethod
    def load(cls, path: str | Path, needs_energy: bool = False) -> DeviceProfile:
        """Read a profile.json. Raises UsageError when it is none, or has no energies but `needs_energy`; EnvironmentFault when
        unreadable, damaged or too new."""
        try:
            content = read_json(Path(path))
        except (FileNotFoundError, NotADirectoryError) as error:
            names = ", ".join(sorted(path.stem for path in saved_profiles()))
            known = f"saved here are {names}; or " if names else ""
            raise UsageError(f"{path}: no such device profile", f"{known}make one: lpvit profile RECIPE --name NAME") from error
        except OSError as error:
            raise EnvironmentFault(f"{path}: cannot be read: {reason(error)}", "give a profile.json you may read") from error
        except ValueError as error:
            raise EnvironmentFault(f"{path}: damaged: {reason(error)}", AGAIN) from error
        if not isinstance(content, dict) or content.get("format") != FORMAT:
            raise UsageError(f"{path}: not a device profile", "give the profile.json that `lpvit profile RECIPE` writes")
        version = content.get("format_version")
        if isinstance(version, int) and version != FORMAT_VERSION:
            raise EnvironmentFault(
                f"{path}: has format_version {version}, this lpvit reads {FORMAT_VERSION}",
                f"update lpvit, or {AGAIN}" if version > FORMAT_VERSION else AGAIN,
            )
        try:
            profile = cls.model_validate(content)
        except ValidationError as error:
            raise EnvironmentFault(f"{path}: damaged: {reason(error)}", AGAIN) from error
        if needs_energy and profile.rest_mj is None:
            raise UsageError(
                f"prune.budget: energy_mj: no meter has filled this profile: {'; '.join(profile.energy_reasons)} ({path})",
                "run `lpvit profile` where a power meter can be read, or with --fit, or give a latency_ms or flops budget",
            )
        return profile


def named_profile(name: str) -> Path:
    """Where `lpvit profile --name` keeps a profile for all recipes of this user."""
    return cache_folder() / PROFILES / f"{name}.json"


def saved_profiles() -> list[Path]:
    return sorted((cache_folder() / PROFILES).glob("*.json"))


def _between(kept: Tensor, fractions: list[float], costs: list[float], dense: float) -> Tensor:
    """A layer with fewer blocks cannot take longer: where it was measured so, the machine was disturbed meanwhile."""
    kept = kept.double().cpu()
    rising = np.minimum.accumulate(costs[::-1])[::-1]
    sparse = torch.as_tensor(np.interp(kept.numpy(), fractions, rising), dtype=torch.float64)
    return torch.where(kept == 1, dense, sparse)
