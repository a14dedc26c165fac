# SPDX-License-Identifier: MIT
"""The configurations of a product's kernel, as `benchmarks.records.Tuned` has them."""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from torch import Tensor

from .record import Tuned

if TYPE_CHECKING:
    from torchpar.kernels.rule import Product, Tiles


def tuned_product(
    product: Callable[[], "Product"],
    launch: Callable[..., Tensor],
    sizes_of: Callable[..., tuple[int, int, int]],
    **others: Any,
) -> Tuned:
    """What `autotune` times of a product: the rule's configurations, except those that split k.

    Args:
        product: returns it. Its file imports Triton, which a record does without.
        launch: ``launch(*operands, precision, wrap, tiles=tiles)`` returns the result.
        sizes_of: m, n and k of operands.
        others: the further attributes of `Tuned`.
    """

    def candidates(operands: Sequence[Tensor], precision: str) -> list["Tiles"]:
        from torchpar.kernels.gemm import empty_by_columns
        from torchpar.kernels.tiles import Choice

        matrices = [empty_by_columns(t, precision) for t in operands if t.dim() == 2]
        choice = Choice(product(), precision, (*sizes_of(*operands), 1), matrices)
        return [tiles for tiles in choice.times if tiles.variant != "split_k"]

    def blocks(tiles: "Tiles", operands: Sequence[Tensor]) -> int:
        from torchpar.kernels.rule import count_tiles

        m, n, _ = sizes_of(*operands)
        return count_tiles(tiles, m, n, product().is_symmetric)

    def estimate(tiles: "Tiles", operands: Sequence[Tensor], kind: str, gpu: str) -> float:
        from torchpar.testing.estimate import estimate_tiles

        sizes = *sizes_of(*operands), 1
        return estimate_tiles(product(), kind, tiles, sizes, gpu).microseconds

    return Tuned(
        candidates=candidates,
        launch=lambda tiles, operands, *how: launch(*operands, *how, tiles=tiles),
        blocks=blocks,
        estimate=estimate,
        product=product,
        **others,
    )
