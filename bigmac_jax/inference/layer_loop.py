"""A decoder's loop over stacked layers: what of their parameters it slices, and what stays in its stack."""

from typing import Any, NamedTuple

import jax
from jax import Array

from bigmac_jax.inference.int8_weights import Int8
from bigmac_jax.model.gathering import InStack
from bigmac_jax.model.kernels import LANES
from bigmac_jax.model.mesh import axes_of, platform, spec_of
from bigmac_jax.model.parameters import Declaration, map_declared
from bigmac_jax.model.transformer import Block

Group = tuple[Block, ...]  # layers that a loop goes through in turn, each as often as its parameters are deep


class Loop(NamedTuple):
    """A group's parameters in a loop over its trips. Most are sliced; experts' matrices stay in their stack, because a
    step would copy them (`InStack`)."""

    sliced: list[Any]  # None for what stays
    stay: list[Any]  # None for what is sliced
    tree: Any

    @classmethod
    def of(cls, group: Group) -> "Loop":
        def is_int8(node: Any) -> bool:
            return isinstance(node, Int8)

        leaves, tree = jax.tree.flatten(group, is_leaf=is_int8)
        declarations = jax.tree.leaves(map_declared(lambda declaration, _: declaration, group), is_leaf=is_int8)
        stays = [_stays(leaf, declaration) for leaf, declaration in zip(leaves, declarations, strict=True)]
        return cls(
            [None if stay else leaf for stay, leaf in zip(stays, leaves, strict=True)],
            [leaf if stay else None for stay, leaf in zip(stays, leaves, strict=True)],
            tree,
        )

    def in_trip(self, sliced: list[Any], trip: Array) -> Group:
        """The group's layers in one trip."""
        pairs = zip(sliced, self.stay, strict=True)
        leaves = [leaf if stack is None else InStack(stack, trip) for leaf, stack in pairs]
        return jax.tree.unflatten(self.tree, leaves)


def _stays(leaf: Any, declaration: Any) -> bool:
    """Whether it is a stack of experts' matrices that are used as they stand: neither dequantized nor gathered, and on
    TPU row by row, as a kernel takes them; XLA turns over what does not fill whole lanes, and would copy all layers."""
    if not (isinstance(leaf, Array) and isinstance(declaration, Declaration) and leaf.shape[0] > 1):
        return False
    on_rank = jax.typeof(leaf).sharding.shard_shape(leaf.shape)
    by_rows = platform() != "tpu" or all(size % LANES == 0 for size in on_rank[-2:])
    of_experts = declaration.part == "experts" and not declaration.small
    return of_experts and by_rows and axes_of(spec_of(leaf)) <= set(declaration.split)


def count_trips(group: Group) -> int:
    """Number of times that a loop goes through its layers."""
    return jax.tree.leaves(group)[0].shape[0]
