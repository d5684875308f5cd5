"""A recipe: one YAML file that says which model, which data, and what every stage does with them.

`Recipe.load` reads a file (or the name of a shipped recipe), applies `--set` overrides, and either returns a frozen,
fully resolved recipe or raises a `UsageError` that names the file, the line, the key and the rule.
"""

from __future__ import annotations

import difflib
from fnmatch import fnmatch
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import yaml
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    PositiveInt,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)

from lpvit_cli.errors import UsageError
from lpvit_cli.recipe_errors import explain
from lpvit_cli.recipe_source import apply_override, is_profile_name, key_lines

Fraction = Annotated[float, Field(ge=0, le=1)]
Block = tuple[PositiveInt, PositiveInt]
Dtype = Literal["auto", "float32", "bfloat16", "float16"]
Subject = Literal[
    "dense",
    "dense-compiled",
    "dense-graph",
    "dense-compiled-graph",
    "dense-onnx",
    "masked-dense",
    "masked-dense-compiled",
    "masked-dense-graph",
    "masked-dense-compiled-graph",
    "sparse",
    "sparse-compiled",
    "sparse-graph",
    "sparse-compiled-graph",
    "onnx",
]
ExportFormat = Literal["onnx", "torch", "pt2", "aoti", "openvino", "triton-server", "hub"]

DENSE, PRUNED = "dense", ("sparse", "onnx")  # what the names of bench's subjects begin with


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=())


class Preprocess(Section):
    """What differs from the model's own preprocessing (timm's pretrained_cfg). Pixels are in 0..1 before mean and std."""

    mean: tuple[float, float, float] | None = None
    std: tuple[float, float, float] | None = None
    crop_pct: float | None = Field(default=None, gt=0, le=1)
    interpolation: Literal["bicubic", "bilinear", "nearest"] | None = None


class ModelSection(Section):
    """The dense model: a timm name (or `hf-hub:owner/name`), its constructor arguments, and where its weights come from."""

    name: str
    pretrained: bool = False
    weights: Path | None = None
    kwargs: dict[str, Any] = {}
    preprocess: Preprocess = Preprocess()

    @field_validator("weights")
    @classmethod
    def _beside_the_recipe(cls, path: Path | None, info: ValidationInfo) -> Path | None:
        return _resolved(path, info)

    @model_validator(mode="after")
    def _one_source_of_weights(self) -> Self:
        if self.pretrained and self.weights:
            raise ValueError("give either pretrained: true or weights: FILE, not both")
        return self


class DataSection(Section):
    """Images: `digits` and `synthetic` are built in, `folder` and `tar` need root, `hfds/NAME` and `wds/NAME` as in timm."""

    dataset: str
    root: Path | None = None
    train_split: str = "train"
    val_split: str = "validation"
    val_images: PositiveInt | None = None  # None: all of them
    batch_size: PositiveInt = 64
    workers: int = Field(default=4, ge=0)
    max_corrupt: Fraction = 0.01  # unreadable images are skipped and counted; more than this fraction is an error

    @field_validator("root")
    @classmethod
    def _beside_the_recipe(cls, path: Path | None, info: ValidationInfo) -> Path | None:
        return _resolved(path, info)


class CalibrateSection(Section):
    """Statistics of the dense model. `gradient` is the loss they are taken of: `empirical` uses the given labels; without
    labels, `sampled` draws them from the model (the true Fisher) and `logits` takes mean(logits^2) (LPViT)."""

    images: PositiveInt = 2048
    batch_size: PositiveInt = 16
    gradient: Literal["empirical", "sampled", "logits"] = "empirical"


class Budget(Section):
    """How much to keep: `flops` = kept fraction of the whole model's FLOPs, `sparsity` = removed fraction of the prunable
    weights, `latency_ms` of a batch and `energy_mj` of an image as the device profile predicts them (`lpvit profile`),
    `max_drop` = points of top-1 that may be lost before recovery (the sparsest such model is searched)."""

    flops: float | None = Field(default=None, gt=0, le=1)
    sparsity: float | None = Field(default=None, ge=0, lt=1)
    latency_ms: float | None = Field(default=None, gt=0, allow_inf_nan=False)
    energy_mj: float | None = Field(default=None, gt=0, allow_inf_nan=False)
    max_drop: float | None = Field(default=None, ge=0, le=100)

    @model_validator(mode="after")
    def _exactly_one(self) -> Self:
        if len(self.model_dump(exclude_none=True)) != 1:
            kinds = ", ".join(type(self).model_fields)
            raise ValueError(f"give exactly one of {kinds} (lpvit recipes show digits_vit)")
        return self

    @property
    def kind(self) -> str:
        return next(iter(self.model_dump(exclude_none=True)))

    @property
    def value(self) -> float:
        value: float = getattr(self, self.kind)
        return value

    @property
    def needs_profile(self) -> bool:
        return self.kind in ("latency_ms", "energy_mj")


class Power(Section):
    """The power model E = e_mac * MACs + e_byte * bytes, per image. Defaults: fp32 multiply-add 4.6 pJ, DRAM 160 pJ/byte
    (Horowitz, ISSCC 2014, 45 nm). They weigh layers against each other; they are no measurement of your device."""

    e_mac_pj: float = Field(default=4.6, ge=0)
    e_byte_pj: float = Field(default=160.0, ge=0)
    batch_size: PositiveInt = 1  # images that share one read of the weights


class Layers(Section):
    """Which nn.Linear modules may be pruned, by glob over their names in timm."""

    include: tuple[str, ...] = ("blocks.*", "*.blocks.*")
    exclude: tuple[str, ...] = ()

    def match(self, name: str) -> bool:
        return any(fnmatch(name, glob) for glob in self.include) and not any(fnmatch(name, glob) for glob in self.exclude)


class PruneSection(Section):
    """Which blocks go. `beta` weighs power against distortion; where every layer sees the same number of tokens (a plain
    ViT) a block costs the same power in every layer, and beta changes nothing."""

    method: Literal["obs", "mfac", "fisher", "lpvit", "taylor", "wanda", "magnitude"] = "obs"
    reweigh: int = Field(default=2, ge=0)  # with obs: how often layers are weighed anew by gradients of the pruned model
    sequential: bool = True  # with obs: each layer on the inputs of the already pruned ones
    fisher_images: PositiveInt = 128  # with mfac and fisher: calibration images, each with a gradient of its own
    block: Block | Annotated[tuple[Block, ...], Field(min_length=1)] = (64, 32)  # output x input features; of several, a layer
    # takes the one that suits it
    patterns: tuple[Literal["balanced", "neurons", "heads"], ...] = ()  # balanced: equal counts in every block row; neurons,
    # heads: whole hidden neurons (in groups of the block's width) and attention heads, cut out of both layers
    budget: Budget = Budget(flops=0.5)
    profile: Path | None = None  # the name of a saved device profile (lpvit profile --name), or a profile.json, for budgets in
    # ms and mJ and for predictions; None: that of this run
    beta: Literal["auto"] | Annotated[float, Field(ge=0, allow_inf_nan=False)] = "auto"
    min_keep: Fraction = 0.05  # of each layer's blocks
    layers: Layers = Layers()
    power: Power = Power()

    @field_validator("profile")
    @classmethod
    def _named_or_beside_the_recipe(cls, path: Path | None, info: ValidationInfo) -> Path | None:
        return path if path and is_profile_name(str(path)) else _resolved(path, info)

    @field_validator("block", mode="before")
    @classmethod
    def _is_block_or_blocks(cls, block: Any) -> Any:
        """Both forms at once: an error of each would leave the reader to guess which one was meant."""
        shapes = block if isinstance(block, list | tuple) and block and isinstance(block[0], list | tuple) else [block]
        for shape in shapes:
            fits = isinstance(shape, list | tuple) and len(shape) == 2 and all(type(n) is int and n > 0 for n in shape)
            if not fits:
                raise ValueError(
                    "a block is two whole numbers above 0, [output, input] features; several blocks are a list of them"
                )
        return block

    @model_validator(mode="after")
    def _patterns_fit(self) -> Self:
        if self.patterns and self.method != "obs":
            raise ValueError("patterns need method: obs")
        if self.budget.needs_profile and set(self.patterns) & {"neurons", "heads"}:
            raise ValueError("neurons and heads need a budget of flops, sparsity or max_drop: a profile has no smaller layers")
        return self

    @property
    def blocks(self) -> tuple[Block, ...]:
        """The shapes of `block`, each once."""
        return tuple(dict.fromkeys((self.block,) if isinstance(self.block[0], int) else self.block))


class Augment(Section):
    """timm's training augmentation. `mixup` and `cutmix` are the alpha of their Beta distribution, `erasing` and `flip`
    probabilities; 0: not at all."""

    rand_augment: str | None = "rand-m9-mstd0.5-mmax9-inc1"  # at 10, posterize would be to 0 bits: refused by Pillow
    mixup: float = Field(default=0.0, ge=0)
    cutmix: float = Field(default=0.0, ge=0)
    erasing: Fraction = 0.0
    flip: Fraction = 0.5


class Distill(Section):
    """Distillation: (1 - weight) * cross-entropy + weight * T^2 * KL from the teacher (`soft`), or cross-entropy with the class
    the teacher decides for (`hard`, as in DeiT, without its token). `teacher`: any timm model of the same classes; None: the
    dense parent."""

    kind: Literal["soft", "hard"] = "soft"
    weight: Fraction = 0.5
    temperature: float = Field(default=2.0, gt=0)
    teacher: ModelSection | None = None


class Mfac(Section):
    """SGD preconditioned by the inverse Fisher of the latest `window` gradients plus `damping` (M-FAC, arXiv 2107.03356). Takes
    window x trained parameters x 4 bytes, in the checkpoint too. The default window goes with the default finetune.lr; steps
    grow with the window, so halve one when you double the other."""

    window: PositiveInt = 128
    damping: float = Field(default=1e-4, gt=0)


class FinetuneSection(Section):
    """Recovery on kept blocks. `lora_ga` starts low-rank adapters from the gradient, `lora` at random, `full` trains all kept
    weights. `alpha`, `gamma`: the scales of the paper. Validated after every epoch, the best model is kept, the pruned one if
    none is better."""

    method: Literal["lora_ga", "lora", "full"] = "lora_ga"
    epochs: PositiveInt = 10
    # for all pruned layers, or by glob: the first that matches a layer counts, a layer that none matches stays as it is
    rank: PositiveInt | Annotated[dict[str, PositiveInt], Field(min_length=1)] = 16
    alpha: float = Field(default=16.0, gt=0)
    gamma: float = Field(default=16.0, gt=0)
    init_batches: PositiveInt = 8
    also_train: tuple[Literal["norms", "biases", "head"], ...] = ("norms", "biases")
    optimizer: Literal["adamw", "mfac"] = "adamw"
    mfac: Mfac = Mfac()  # with optimizer: mfac
    lr: float = Field(default=1e-3, gt=0)
    weight_decay: float = Field(default=0.0, ge=0)
    warmup_epochs: float = Field(default=1.0, ge=0)
    accumulate: PositiveInt = 1  # batches of data.batch_size images a step
    clip_norm: float = Field(default=1.0, gt=0)
    ema: float | None = Field(default=None, gt=0, lt=1)  # decay of a moving average of what is trained, which is then kept
    label_smoothing: Fraction = 0.0
    augment: Augment | None = None
    distill: Distill | None = Distill()
    target_top1: float | None = Field(default=None, gt=0, le=100)  # stop as soon as the validation accuracy is that good

    @model_validator(mode="after")
    def _decays_to_the_pruned_model(self) -> Self:
        if self.weight_decay and self.method == "lora_ga":
            raise ValueError(
                "weight_decay needs method: lora or full (LoRA-GA's factors start at full length: decay undoes it)"
            )
        return self


class EnergySection(Section):
    window_seconds: float = Field(default=10.0, gt=0)
    trials: int = Field(default=6, ge=6)
    required: bool = False  # exit code 3 where energy could not be measured; the times are kept
    allow_mig: bool = False  # on a GPU split by MIG, whose power is that of all its users


class BenchSection(Section):
    """What is compared, in turn in one process. `subjects`: the dense model, masked-dense (the same zeros in dense layers), and
    sparse; in eager PyTorch (on a GPU also as CUDA graphs), -compiled by torch.compile, or as a CUDA -graph; onnx is the file
    of `lpvit export`, dense-onnx the dense model in onnxruntime. Ratios are against the fastest dense one, or `baseline`."""

    subjects: tuple[Subject, ...] = ("dense", "masked-dense", "sparse")
    baseline: Path | None = None  # another run folder, model folder or ONNX file
    batch_sizes: Annotated[tuple[PositiveInt, ...], Field(min_length=1)] = (1, 8)
    dtypes: tuple[Dtype, ...] = ()  # none: the recipe's
    rounds: int = Field(default=30, ge=6)
    warmup_seconds: float = Field(default=2.0, ge=0)
    threads: PositiveInt | None = None  # CPU threads; None: torch's default
    layers: bool = False  # time every linear layer within the model
    energy: EnergySection = EnergySection()

    @field_validator("baseline")
    @classmethod
    def _beside_the_recipe(cls, path: Path | None, info: ValidationInfo) -> Path | None:
        return _resolved(path, info)

    @field_validator("subjects", "batch_sizes", "dtypes")
    @classmethod
    def _each_once(cls, values: tuple[Any, ...]) -> tuple[Any, ...]:
        return tuple(dict.fromkeys(values))

    @model_validator(mode="after")
    def _has_two_sides(self) -> Self:
        if not any(name.startswith(PRUNED) for name in self.subjects):
            raise ValueError("subjects: needs a pruned one to compare: sparse, sparse-compiled, sparse-graph, or onnx")
        if self.baseline is None and not any(name.startswith(DENSE) for name in self.subjects):
            raise ValueError("subjects: needs a dense one to compare with, or a baseline")
        return self


class ProfileSection(Section):
    """Layers one by one, dense and block-sparse, for `lpvit profile`; threads, energy windows, first dtype are bench's."""

    batch_size: PositiveInt = 1
    rounds: int = Field(default=30, ge=6)


class ExportSection(Section):
    """What `lpvit export` writes. `form`: how block-sparse layers are written; auto times the forms in onnxruntime (for pt2 and
    aoti in torch) with `threads` and `batch_size`, and takes the fastest. int8 finds the range of each activation as it runs,
    int8-static has it from the calibration images. `tolerance` bounds ||file - model|| / ||model|| of the logits, `max_drop`
    the points of top-1 lost."""

    formats: Annotated[tuple[ExportFormat, ...], Field(min_length=1)] = ("onnx",)
    form: Literal["auto", "dense", "rows", "chain", "batched"] = "auto"
    precision: Literal["float32", "float16", "bfloat16", "int8", "int8-static"] = "float32"
    opset: int = Field(default=20, ge=20)
    threads: PositiveInt | None = None  # None: all cores
    batch_size: PositiveInt = 1
    tolerance: float | None = Field(default=None, gt=0)  # None: by precision
    max_drop: float = Field(default=1.0, ge=0, le=100)


class Recipe(Section):
    """Everything a run does. Frozen; paths are absolute; every default is filled in."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9._-]+$")]
    seed: int = Field(default=0, ge=0)
    device: str = "auto"  # auto, cpu, cuda, cuda:1
    dtype: Dtype = "auto"  # compute type; auto: bfloat16 on GPUs, float32 on CPUs
    model: ModelSection
    data: DataSection
    calibrate: CalibrateSection = CalibrateSection()
    prune: PruneSection = PruneSection()
    sweep: tuple[float, ...] = ()  # budgets of `lpvit prune --sweep`, of the same kind as prune.budget
    schedule: tuple[float, ...] = ()  # budgets of `lpvit gradual`, of the same kind, each below the one before
    finetune: FinetuneSection | None = FinetuneSection()
    bench: BenchSection = BenchSection()
    profile: ProfileSection = ProfileSection()
    export: ExportSection = ExportSection()

    @field_validator("sweep", "schedule")
    @classmethod
    def _holds_budgets(cls, budgets: tuple[float, ...], info: ValidationInfo) -> tuple[float, ...]:
        if "prune" in info.data:  # absent when it is invalid itself
            for value in budgets:
                Budget.model_validate({info.data["prune"].budget.kind: value})
        return budgets

    @field_validator("schedule")
    @classmethod
    def _prunes_more_and_more(cls, schedule: tuple[float, ...], info: ValidationInfo) -> tuple[float, ...]:
        if not schedule or "prune" not in info.data:
            return schedule
        prune: PruneSection = info.data["prune"]
        if prune.budget.max_drop is not None or prune.patterns or len(prune.blocks) > 1:
            raise ValueError(
                "a schedule needs a budget other than max_drop, one block shape, and no patterns: they may bring back blocks"
            )
        downwards = tuple(sorted(set(schedule), reverse=prune.budget.sparsity is None))
        if schedule != downwards:
            raise ValueError(f"each {prune.budget.kind} must leave less than the one before: {list(downwards)}")
        return schedule

    @classmethod
    def load(cls, path_or_name: str | Path, overrides: tuple[str, ...] | list[str] = ()) -> Recipe:
        """Read a recipe file, or a shipped recipe by name, with `a.b=value` overrides (values are YAML).

        Raises UsageError naming file, line, key, rule, and the nearest valid key.
        """
        path = find_recipe(path_or_name)
        try:
            source = path.read_text(encoding="utf-8")
            content = yaml.safe_load(source)
            lines = key_lines(yaml.compose(source, Loader=yaml.SafeLoader))
        except (OSError, UnicodeDecodeError) as error:
            raise UsageError(f"{path}: cannot be read: {error}", "check the path and its permissions") from error
        except yaml.YAMLError as error:
            mark = getattr(error, "problem_mark", None)
            where = f"{path}:{mark.line + 1}" if mark else str(path)
            raise UsageError(
                f"{where}: not valid YAML: {getattr(error, 'problem', error)}", "fix the syntax at that line"
            ) from error
        if not isinstance(content, dict):
            raise UsageError(
                f"{path}: a recipe is a YAML mapping, this is {type(content).__name__}",
                "compare: lpvit recipes show digits_vit",
            )
        content.setdefault("name", path.stem)
        origin = {key: f"{path}:{line}" for key, line in lines.items()}
        for override in overrides:
            key = apply_override(content, override)
            origin = {k: v for k, v in origin.items() if k[: len(key)] != key}
            origin[key] = f"--set {override}"
        try:
            return cls.model_validate(content, context={"folder": path.parent})
        except ValidationError as error:
            raise explain(error, cls, content, origin, path) from None

    def smoke(self, architecture: str, kwargs: dict[str, Any]) -> Recipe:
        """The same recipe made small: a randomly initialised model, generated images, one epoch.

        `architecture` and `kwargs` are the small model's (see models.shrink).
        """
        small: dict[str, Any] = self.model_dump()
        small["name"] += "-smoke"
        small["model"] |= {"name": architecture, "pretrained": False, "weights": None, "kwargs": kwargs}
        small["data"] |= {"dataset": "synthetic", "root": None, "batch_size": 16, "workers": 0, "val_images": 32}
        small["calibrate"] |= {"images": 32, "batch_size": 8}
        small["prune"]["reweigh"] = min(1, self.prune.reweigh)
        small["bench"] |= {"batch_sizes": (2,), "rounds": 6, "warmup_seconds": 0.2}
        small["bench"]["energy"] = {"window_seconds": 2.0, "trials": 6}
        small["profile"] = {"batch_size": 2, "rounds": 6}
        small["schedule"] = self.schedule[-2:]
        if self.finetune:
            small["finetune"] |= {
                "epochs": 1,
                "init_batches": 1,
                "rank": 4,
                "warmup_epochs": 0,
            }
        return Recipe.model_validate(small)

    def flat(self) -> dict[str, Any]:
        """Dotted keys to plain values, as fingerprints and messages use them."""
        return flatten(self.model_dump(mode="json"))

    def to_yaml(self) -> str:
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False)


def recipes_folder() -> Path:
    """Where the shipped recipes are: inside the installed package, or in the checkout."""
    packaged = Path(__file__).parent / "configs"
    return packaged if packaged.is_dir() else Path(__file__).parent.parent / "configs"


def shipped_recipes() -> list[Path]:
    return sorted(recipes_folder().glob("*.yaml"))


def find_recipe(path_or_name: str | Path) -> Path:
    path = Path(path_or_name)
    if path.is_file():
        return path.resolve()
    shipped = {p.stem: p for p in shipped_recipes()}
    if str(path_or_name) in shipped:
        return shipped[str(path_or_name)]
    near = difflib.get_close_matches(path.stem, shipped, n=1)
    raise UsageError(
        f"no recipe {str(path_or_name)!r}: neither a file nor a shipped recipe",
        f"did you mean {near[0]!r}?" if near else f"shipped recipes: {', '.join(shipped)}",
    )


def flatten(tree: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(tree, dict):
        return {prefix: tree}
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        flat |= flatten(value, f"{prefix}.{key}" if prefix else str(key))
    return flat


def _resolved(path: Path | None, info: ValidationInfo) -> Path | None:
    """A relative path is meant from the recipe's folder; in a copy of a shipped recipe, also from that of the original."""
    if path is None or path.is_absolute() or not info.context:
        return path and path.expanduser().resolve()
    beside = info.context["folder"] / path.expanduser()
    shipped = recipes_folder() / path
    return (shipped if shipped.exists() and not beside.exists() else beside).resolve()
