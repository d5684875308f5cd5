"""What can be added to lpvit, by name: pruning methods, budgets, export formats, power meters.

Each built-in is one file and one line here. Another package adds its own with `register`, or without being imported first by
an entry point of the group `lpvit.<kind>`. The choices of recipes, `--help` and docs/recipe.md come from these registries.
Nothing is imported before it is used: names alone are needed to read a recipe.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from importlib import import_module
from importlib.metadata import entry_points
from types import TracebackType
from typing import Any

from lpvit_cli.errors import EnvironmentFault, UsageError


class Registry:
    """Things of one kind, by name. `built_in` holds "module:attribute" for each."""

    def __init__(self, kind: str, key: str, group: str, built_in: Mapping[str, str]):
        self.kind, self.key, self.group = kind, key, group
        self._places = dict(built_in)
        self._things: dict[str, Any] = {}
        self._plugins: dict[str, Any] | None = None

    def names(self) -> list[str]:
        """Built-in first, then what was registered, then entry points."""
        return list(dict.fromkeys((*self._places, *self._things, *self._entry_points())))

    def register(self, name: str, thing: Any) -> None:
        """Add a thing of another package. Raises ValueError for a name that is taken."""
        if name in self.names():
            raise ValueError(f"there is a {self.kind} {name!r} already")
        self._things[name] = thing

    def unregister(self, name: str) -> None:
        """Take out what `register` added."""
        del self._things[name]

    def get(self, name: str) -> Any:
        """The thing of this name. Raises UsageError, with the nearest names, where there is none, and EnvironmentFault where
        another package's does not load."""
        if name in self._things:
            return self._things[name]
        if name in self._places:
            module, _, attribute = self._places[name].partition(":")
            return getattr(import_module(module), attribute)
        if name in self._entry_points():
            self._things[name] = self._load(self._entry_points()[name])
            return self._things[name]
        near = difflib.get_close_matches(name, self.names(), n=1)
        raise UsageError(
            f"{self.key}: there is no {self.kind} {name!r}",
            f"did you mean {near[0]!r}?" if near else f"choose one of {', '.join(self.names())}",
        )

    def require(self, name: str) -> str:
        """`name`, if it is known; ValueError with the rule if not, as recipes validate their values."""
        if name not in self.names():
            *first, last = (repr(known) for known in self.names())
            raise ValueError(f"should be {', '.join(first)} or {last}" if first else f"should be {last}")
        return name

    def foreign(self) -> dict[Any, str]:
        """What is not lpvit's own, with its name in words."""
        return {thing: f"{self.kind} {name!r}" for name, thing in self._things.items()}

    def _load(self, point: Any) -> Any:
        try:
            return point.load()
        except Exception as error:  # of another package: anything
            package = point.dist.name if point.dist else point.value
            raise EnvironmentFault(
                f"the {self.kind} {point.name!r} of {package} cannot be loaded: {type(error).__name__}: {error}",
                f"update or uninstall {package}",
            ) from error

    def _entry_points(self) -> dict[str, Any]:
        if self._plugins is None:
            self._plugins = {point.name: point for point in entry_points(group=self.group)}
        return self._plugins


METHODS = Registry(
    "pruning method",
    "prune.method",
    "lpvit.methods",
    {
        "obs": "lpvit_cli.pruning.methods.obs:Obs",
        "mfac": "lpvit_cli.pruning.methods.mfac:Mfac",
        "fisher": "lpvit_cli.pruning.methods.fisher:BlockFisher",
        "lpvit": "lpvit_cli.pruning.methods.lpvit:Lpvit",
        "taylor": "lpvit_cli.pruning.methods.taylor:Taylor",
        "wanda": "lpvit_cli.pruning.methods.wanda:Wanda",
        "magnitude": "lpvit_cli.pruning.methods.magnitude:Magnitude",
    },
)
BUDGETS = Registry(
    "budget",
    "prune.budget",
    "lpvit.budgets",
    {
        "flops": "lpvit_cli.pruning.budgets.flops:Flops",
        "sparsity": "lpvit_cli.pruning.budgets.sparsity:Sparsity",
        "latency_ms": "lpvit_cli.pruning.budgets.latency_ms:Latency",
        "energy_mj": "lpvit_cli.pruning.budgets.energy_mj:Energy",
        "max_drop": "lpvit_cli.pruning.budgets.max_drop:MaxDrop",
    },
)
FORMATS = Registry(
    "export format",
    "export.formats",
    "lpvit.formats",
    {
        "onnx": "lpvit_cli.export.formats.onnx:Onnx",
        "torch": "lpvit_cli.export.formats.torch:Torch",
        "pt2": "lpvit_cli.export.formats.pt2:Pt2",
        "aoti": "lpvit_cli.export.formats.aoti:Aoti",
        "openvino": "lpvit_cli.export.formats.openvino:OpenVino",
        "triton-server": "lpvit_cli.export.formats.triton_server:TritonServer",
        "hub": "lpvit_cli.export.formats.hub:Hub",
    },
)
METERS = Registry(
    "power meter",
    "meter",
    "lpvit.meters",
    {
        "nvml": "lpvit_cli.measure.energy.meters.nvml:NvmlMeter",
        "rapl": "lpvit_cli.measure.energy.meters.rapl:RaplMeter",
    },
)
ALL = (METHODS, BUDGETS, FORMATS, METERS)


def foreign_culprit(traceback: TracebackType | None) -> str | None:
    """Which thing of another package an exception came through, in words; None: it is lpvit's own."""
    foreign = {thing: words for registry in ALL for thing, words in registry.foreign().items()}
    found = None
    while traceback is not None:
        here = traceback.tb_frame.f_locals
        owner = here.get("cls", type(here.get("self")))
        kin = next(
            (thing for thing in foreign if isinstance(owner, type) and isinstance(thing, type) and issubclass(thing, owner)),
            None,
        )
        if kin is not None and owner is not object and not owner.__module__.startswith("lpvit_cli."):
            found = f"the {foreign[kin]} ({kin.__module__})"
        traceback = traceback.tb_next
    return found
