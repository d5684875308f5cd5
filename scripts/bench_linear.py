"""One block-sparse linear layer against dense F.linear, interleaved in one process.

    python scripts/bench_linear.py --threads 1 --output benchmarks/results/linear_cpu.json

Prints a table of ratios (dense time over sparse time: above 1 is faster); the last line of stdout is the result as JSON.
"""

import argparse
from pathlib import Path

import torch
from lpvit_kernels import BlockSparseMatrix, linear
from results import publish
from torch import Tensor
from torch.nn import functional as F

from lpvit_cli.measure.timing import time_interleaved

LAYERS = ((3072, 768), (768, 3072))  # out x in: fc1 and fc2 of ViT-B
BLOCKS = ((128, 32), (64, 64), (32, 32))
SPARSITIES = (0.5, 0.7, 0.8)


def kept_blocks(grid: tuple[int, int], sparsity: float) -> Tensor:
    """A random block mask with exactly the asked fraction of blocks removed."""
    blocks = grid[0] * grid[1]
    return (torch.randperm(blocks) >= round(sparsity * blocks)).reshape(grid)


def bench(layer: tuple[int, int], block: tuple[int, int], sparsity: float, args: argparse.Namespace) -> dict[str, object]:
    device, dtype = torch.device(args.device), getattr(torch, args.dtype)
    x = torch.randn(args.tokens, layer[1], device=device, dtype=dtype)
    weight, bias = torch.randn(layer, device=device, dtype=dtype), torch.randn(layer[0], device=device, dtype=dtype)
    mask = kept_blocks((layer[0] // block[0], layer[1] // block[1]), sparsity)
    sparse = BlockSparseMatrix.from_dense(weight, block, mask)
    zeros = sparse.to_dense()
    with torch.inference_mode():
        error = (linear(x, sparse, bias) - F.linear(x, zeros, bias)).norm() / F.linear(x, zeros, bias).norm()
        if not error < (1e-5 if dtype == torch.float32 else 2e-2):
            raise SystemExit(f"wrong result: relative error {error:.1e}")
        run = time_interleaved(
            {"dense": lambda: F.linear(x, weight, bias), "sparse": lambda: linear(x, sparse, bias)},
            device=device,
            rounds=args.rounds,
            warmup_seconds=0.5,
        )
    ratio = run.ratio("dense", "sparse")
    dense, timed = run.subjects["dense"], run.subjects["sparse"]
    return {
        "layer": f"{layer[1]}->{layer[0]}",
        "block": f"{block[0]}x{block[1]}",
        "sparsity": sparsity,
        "dense_ms": round(dense.percentiles.p50, 4),
        "sparse_ms": round(timed.percentiles.p50, 4),
        "ratio": round(ratio.value, 3),
        "ratio_low": round(ratio.low, 3),
        "ratio_high": round(ratio.high, 3),
        "variation": round(timed.variation, 3),
        "foreign_load": None if run.foreign_load is None else round(run.foreign_load, 3),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, default=197)
    parser.add_argument("--threads", type=int, default=1, help="CPU threads")
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16", "float16"))
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()

    torch.manual_seed(0)
    torch.set_num_threads(args.threads)
    rows = []
    print(f"{'layer':>12} {'block':>8} {'sparsity':>8} {'dense ms':>9} {'sparse ms':>9}  ratio (95 % interval)   ideal")
    for layer in LAYERS:
        for block in BLOCKS:
            for sparsity in SPARSITIES:
                row = bench(layer, block, sparsity, args)
                rows.append(row)
                interval = f"{row['ratio']:.2f} ({row['ratio_low']:.2f} to {row['ratio_high']:.2f})"
                times = f"{row['dense_ms']:9.3f} {row['sparse_ms']:9.3f}"
                ideal = f"{1 / (1 - sparsity):7.2f}"
                print(f"{row['layer']:>12} {row['block']:>8} {sparsity:8.0%} {times}  {interval:21} {ideal}", flush=True)
    publish(
        "bench_linear",
        ("torch", "triton"),
        args.output,
        device=torch.cuda.get_device_name() if args.device.startswith("cuda") else "cpu",
        dtype=args.dtype,
        tokens=args.tokens,
        threads=args.threads,
        rows=rows,
    )


if __name__ == "__main__":
    main()
