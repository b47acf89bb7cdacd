"""Learned positions of images: grids resized to the image at hand, and embeddings looked up by tile.

All of it exports with dynamic sizes. Resizing is two matrix products, one an axis, whose matrices are arithmetic on
the output's indices: no back end needs an interpolation kernel, and the results are those of
``torch.nn.functional.interpolate`` with ``align_corners=False``.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

Mode = Literal["bilinear", "bicubic"]
REACH = {"bilinear": 1, "bicubic": 2}
# Keys, "Cubic convolution interpolation", 1981: torch takes -0.5 with antialiasing and -0.75 without.
CUBIC = {True: -0.5, False: -0.75}


def _kernel(distance: Tensor, mode: Mode, slope: float) -> Tensor:
    """The weight of a sample at `distance` grid cells."""
    d = distance.abs()
    if mode == "bilinear":
        return (1 - d).clamp(min=0)
    near = ((slope + 2) * d - (slope + 3)) * d * d + 1
    far = ((slope * d - 5 * slope) * d + 8 * slope) * d - 4 * slope
    return torch.where(d <= 1, near, torch.where(d < 2, far, torch.zeros_like(d)))


def resize_matrix(samples: int, size: int, mode: Mode, *, antialias: bool = False) -> Tensor:
    """Return float32 [size, samples]: each row the weights with which `samples` grid points make one output.

    Without `antialias` samples beyond the border count as the border's; with it the kernel is widened where the output
    is smaller than the grid, and weights are normalized over the samples there are.
    """
    index = torch.arange(size).unsqueeze(1)
    # The number of outputs as a tensor: engines differ in what arithmetic they do on sizes.
    step = samples / (index[-1:] + 1).float()
    centre = (index.float() + 0.5) * step
    if antialias:
        weights = _kernel((torch.arange(samples) + 0.5 - centre) / step.clamp(min=1), mode, CUBIC[True])
        return weights / weights.sum(dim=1, keepdim=True)
    reach = REACH[mode]
    beyond = torch.arange(-reach, samples + reach)
    folded = torch.eq(beyond.clamp(0, samples - 1).unsqueeze(1), torch.arange(samples)).float()
    return _kernel(beyond + 0.5 - centre, mode, CUBIC[False]) @ folded


def resize_grid(grid: Tensor, height: int, width: int, mode: Mode, *, antialias: bool = False) -> Tensor:
    """Resize `grid` [H, W, D] to [height, width, D]."""
    rows = resize_matrix(grid.shape[0], height, mode, antialias=antialias).to(grid.dtype)
    columns = resize_matrix(grid.shape[1], width, mode, antialias=antialias).to(grid.dtype)
    tall = (rows @ grid.flatten(1)).unflatten(1, grid.shape[1:])
    return torch.matmul(columns, tall)


class GridPositionEmbedding(nn.Module):
    """Adds a learned grid of positions to patches, resized to as many rows and columns as there are (DINOv2, SigLIP).

    Args:
        height: rows of the learned grid.
        width: columns of the learned grid.
        dim: size of an embedding.
        mode: how to interpolate.
        antialias: whether to widen the kernel for images smaller than the grid.
    """

    def __init__(self, height: int, width: int, dim: int, mode: Mode = "bicubic", *, antialias: bool = False) -> None:
        super().__init__()
        self.grid = nn.Parameter(torch.zeros(height, width, dim))
        self.mode = mode
        self.antialias = antialias

    def forward(self, patches: Tensor) -> Tensor:
        """[B, h, w, D] → [B, h, w, D]."""
        height, width = patches.shape[1], patches.shape[2]
        return patches + resize_grid(self.grid, height, width, self.mode, antialias=self.antialias)


def tile_places(aspect_ratio: Tensor, tiles: int, max_tiles: int) -> tuple[Tensor, Tensor]:
    """Return where the tiles of images lie, row by row, in a table of max_tiles x max_tiles places.

    `aspect_ratio` is int64 [B, 2], rows and columns of tiles of each image. Gives places int64 [B, tiles] and which of
    the tiles exist, bool [B, tiles]; a tile beyond rows times columns has place 0.
    """
    rows, columns = aspect_ratio[:, :1], aspect_ratio[:, 1:]
    index = torch.arange(tiles).unsqueeze(0)
    exists = index < rows * columns
    row = torch.div(index, columns, rounding_mode="floor")
    place = row * max_tiles + (index - row * columns)
    return torch.where(exists, place, torch.zeros_like(place)), exists


class TilePositionEmbedding(nn.Module):
    """Adds to every token of a tile the embedding of the tile's place in the image (Llama 3.2 vision).

    ``embedding`` is [max_tiles, max_tiles, 1, dim]; ``gate`` [1] scales it by its tanh. Tiles that do not exist get
    nothing.
    """

    def __init__(self, max_tiles: int, dim: int) -> None:
        super().__init__()
        self.max_tiles = max_tiles
        self.embedding = nn.Parameter(torch.zeros(max_tiles, max_tiles, 1, dim))
        self.gate = nn.Parameter(torch.zeros(1))

    def forward(self, x: Tensor, aspect_ratio: Tensor) -> Tensor:
        """`x` [B, tiles, tokens, dim] and `aspect_ratio` int64 [B, 2]; returns the shape of `x`."""
        return x + _of_tiles(self.embedding, x, aspect_ratio, self.max_tiles) * self.gate.tanh()


class TiledTokenPositionEmbedding(nn.Module):
    """Adds two positions to every token: that within its tile, and that within the whole image (Llama 3.2 vision).

    ``local`` [tokens, dim] is the same in all tiles, ``whole`` [max_tiles, max_tiles, tokens, dim] depends on the place
    of the tile. ``gate`` [1] mixes them: local (1 - tanh(gate)) + whole tanh(gate), the second for tiles that exist.
    """

    def __init__(self, max_tiles: int, tokens: int, dim: int) -> None:
        super().__init__()
        self.max_tiles = max_tiles
        self.local = nn.Parameter(torch.zeros(tokens, dim))
        self.whole = nn.Parameter(torch.zeros(max_tiles, max_tiles, tokens, dim))
        self.gate = nn.Parameter(torch.zeros(1))

    def forward(self, x: Tensor, aspect_ratio: Tensor) -> Tensor:
        """`x` [B, tiles, tokens, dim] and `aspect_ratio` int64 [B, 2]; returns the shape of `x`."""
        gate = self.gate.tanh()
        whole = _of_tiles(self.whole, x, aspect_ratio, self.max_tiles)
        return x + self.local * (1 - gate) + whole * gate


def _of_tiles(table: Tensor, x: Tensor, aspect_ratio: Tensor, max_tiles: int) -> Tensor:
    """Look the tiles of `x` up in `table` [max_tiles, max_tiles, tokens, dim]; [B, tiles, tokens, dim]."""
    places, exists = tile_places(aspect_ratio, x.shape[1], max_tiles)
    found = table.flatten(0, 1).index_select(0, places.reshape(-1)).unflatten(0, places.shape)
    shown = exists.unsqueeze(-1).unsqueeze(-1).to(found.dtype)
    return torch.mul(found, shown)
