"""Grids of positions resize as torch resizes them, tiles find their place, and every engine agrees at every size."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.modules.engines import CHEAP, run_everywhere, together
from triptych.modules.position_embedding import (
    GridPositionEmbedding,
    Mode,
    TiledTokenPositionEmbedding,
    TilePositionEmbedding,
    resize_grid,
    resize_matrix,
)

SIZES = [(5, 7), (12, 9), (1, 1), (3, 16), (7, 6)]


def interpolated(grid: Tensor, height: int, width: int, mode: str, antialias: bool) -> Tensor:
    channels_first = grid.permute(2, 0, 1).unsqueeze(0)
    resized = F.interpolate(channels_first, size=(height, width), mode=mode, align_corners=False, antialias=antialias)
    return resized[0].permute(1, 2, 0)


@pytest.mark.parametrize("antialias", [False, True], ids=["plain", "antialias"])
@pytest.mark.parametrize("mode", ["bilinear", "bicubic"])
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_a_grid_is_resized_as_torch_does(size: tuple[int, int], mode: Mode, antialias: bool) -> None:
    grid = torch.randn(7, 6, 4)
    got = resize_grid(grid, *size, mode, antialias=antialias)
    torch.testing.assert_close(got, interpolated(grid, *size, mode, antialias), rtol=1e-5, atol=2e-6)


def test_a_large_grid_too() -> None:
    grid = torch.randn(37, 37, 8)
    for size in ((16, 64), (30, 53)):
        wanted = interpolated(grid, *size, "bicubic", antialias=False)
        torch.testing.assert_close(resize_grid(grid, *size, "bicubic"), wanted, rtol=1e-4, atol=2e-5)


def test_weights_of_an_output_add_up_to_one() -> None:
    for size in (1, 4, 9, 23):
        torch.testing.assert_close(resize_matrix(9, size, "bicubic").sum(1), torch.ones(size))


def tiled_reference(x: Tensor, ratios: Tensor, table: Tensor) -> Tensor:
    """What is added to each tile, by cutting the table to the image and laying its places out row by row."""
    added = torch.zeros_like(x)
    for image, (rows, columns) in enumerate(ratios.tolist()):
        cut = table[:rows, :columns].reshape(rows * columns, *table.shape[2:])
        added[image, : rows * columns] = cut
    return added


def randomized(module: nn.Module) -> nn.Module:
    for parameter in module.parameters():
        nn.init.normal_(parameter)
    return module.eval()


RATIOS = torch.tensor([[2, 2], [1, 4], [3, 1], [1, 1]])


def test_tiles_get_the_embedding_of_their_place() -> None:
    module = randomized(TilePositionEmbedding(4, 8))
    assert isinstance(module, TilePositionEmbedding)
    x = torch.randn(4, 4, 5, 8)
    wanted = x + tiled_reference(x, RATIOS, module.embedding) * torch.tanh(module.gate)
    torch.testing.assert_close(module(x, RATIOS), wanted)


def test_tokens_get_their_place_in_the_tile_and_in_the_image() -> None:
    module = randomized(TiledTokenPositionEmbedding(4, 5, 8))
    assert isinstance(module, TiledTokenPositionEmbedding)
    x, gate = torch.randn(4, 4, 5, 8), torch.tanh(module.gate)
    wanted = x + module.local * (1 - gate) + tiled_reference(x, RATIOS, module.whole) * gate
    torch.testing.assert_close(module(x, RATIOS), wanted)


def cases() -> tuple[nn.Module, list[tuple[Tensor, ...]]]:
    grids = [
        (
            randomized(GridPositionEmbedding(7, 6, 8, mode, antialias=antialias)),
            [(torch.randn(1, *size, 8),) for size in ((5, 9), (12, 3), (2, 6))],
        )
        for mode, antialias in (("bicubic", False), ("bilinear", True))
    ]
    tiles = [
        (
            randomized(module),
            [
                (torch.randn(1, count, 5, 8), torch.tensor([ratio]))
                for count, ratio in ((4, [2, 2]), (3, [1, 2]), (6, [2, 3]))
            ],
        )
        for module in (TilePositionEmbedding(4, 8), TiledTokenPositionEmbedding(4, 5, 8))
    ]
    return together(*grids, *tiles)


@pytest.mark.parametrize(
    "engines", [CHEAP, pytest.param(("aotinductor",), marks=pytest.mark.slow)], ids=["cheap", "aotinductor"]
)
def test_every_engine_agrees_at_every_size(engines: tuple[str, ...]) -> None:
    run_everywhere(*cases(), engines=engines, atol=1e-5)
