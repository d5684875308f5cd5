"""One merge against plain loops in float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from lpvit_cli.tokens.merge import TokenMerge, match


def by_loops(x: Tensor, size: Tensor, prefix: int, r: int) -> tuple[list[set[int]], dict[int, tuple[Tensor, float]]]:
    """Of one image [n, width]: which tokens become one, and what each set's token and size are."""
    unit = x / x.norm(dim=1, keepdim=True)
    givers, receivers = range(prefix, len(x), 2), range(prefix + 1, len(x), 2)
    nearest = {g: max(receivers, key=lambda k, g=g: float(unit[g] @ unit[k])) for g in givers}
    going = sorted(givers, key=lambda g: -float(unit[g] @ unit[nearest[g]]))[:r]
    sets = [{k} | {g for g in going if nearest[g] == k} for k in range(len(x)) if k not in going]
    made = {}
    for members in sets:
        weights = torch.stack([size[m] for m in members])
        value = sum(x[m] * size[m] for m in members) / weights.sum()
        made[min(members)] = (value, float(weights.sum()))
    return sets, made


@pytest.mark.parametrize("prefix", [0, 1, 5])
@pytest.mark.parametrize("n", [16, 17])
def test_a_merge_is_the_weighted_mean_of_the_nearest_pairs(n: int, prefix: int) -> None:
    generator = torch.Generator().manual_seed(n + prefix)
    x = torch.randn(3, n, 8, generator=generator, dtype=torch.float64)
    size = torch.randint(1, 4, (3, n, 1), generator=generator).double()
    merge = TokenMerge(prefix, 0.3)
    places = torch.arange(n).expand(3, n)
    merged, after, where = merge(x, size, places)
    assert where is not None
    assert merged.shape == (3, n - round(0.3 * (n - prefix)), 8)
    for i in range(3):
        sets, made = by_loops(x[i], size[i], prefix, merge.removed(n))
        assert len(sets) == merged.shape[1]
        for members in sets:
            (place,) = {int(where[i, m]) for m in members}  # all of them are at one token
            value, weight = made[min(members)]
            torch.testing.assert_close(merged[i, place], value)
            assert float(after[i, place]) == weight
    torch.testing.assert_close(merged[:, :prefix], x[:, :prefix])


def test_at_most_half_of_the_patches_go_and_the_prefix_never() -> None:
    assert [TokenMerge(1, 0.5).removed(n) for n in (1, 2, 3, 4, 198)] == [0, 0, 1, 1, 98]
    assert TokenMerge(5, 0.01).removed(20) == 0


def test_the_similarity_of_other_tokens_decides_where_they_are_given() -> None:
    generator = torch.Generator().manual_seed(0)
    x, like = torch.randn(2, 2, 12, 6, generator=generator)
    size = torch.ones(2, 12, 1)
    places = torch.arange(12).expand(2, 12)
    merge = TokenMerge(2, 0.4)
    _, sizes, followed = merge(x, size, places, like)
    _, expected, own = merge(like, size, places)
    assert torch.equal(sizes, expected)
    assert torch.equal(followed, own)
    assert not torch.equal(followed, merge(x, size, places)[2])


def test_tokens_are_matched_in_float32_whatever_their_type() -> None:
    x = torch.randn(1, 40, 16, generator=torch.Generator().manual_seed(0)).bfloat16()
    assert torch.equal(match(x, 1, 10).order, match(x.double(), 1, 10).order)


def test_gradients_reach_every_token() -> None:
    x = torch.randn(1, 9, 4, requires_grad=True)
    merged, _, _ = TokenMerge(1, 0.5)(x, torch.ones(1, 9, 1))
    merged.sum().backward()
    torch.testing.assert_close(x.grad.sum(), torch.tensor(merged.shape[1] * 4.0))
    assert (x.grad != 0).all()


def test_autocast_changes_neither_pairs_nor_sizes() -> None:
    x = torch.randn(2, 257, 32, generator=torch.Generator().manual_seed(0))
    size, places = torch.full((2, 257, 1), 301.0), torch.arange(257).expand(2, 257)
    expected = TokenMerge(1, 0.3)(x, size, places)
    with torch.autocast("cpu", torch.bfloat16):
        found = TokenMerge(1, 0.3)(x, size, places)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_half_precision_does_not_overflow() -> None:
    x, size = torch.full((1, 9, 4), 400.0).half(), torch.full((1, 9, 1), 200.0)
    merged, after, _ = TokenMerge(1, 0.5)(x, size)
    assert merged.dtype == torch.float16
    assert (merged == 400).all()
    assert float(after.sum()) == 9 * 200


def test_where_nothing_can_go_nothing_happens() -> None:
    x, size = torch.randn(1, 2, 4), torch.ones(1, 2, 1)
    assert TokenMerge(1, 0.5)(x, size)[0] is x
