"""What makes the router's logits x W + b: W and b that are parameters (linear, affine, frozen), or that a network puts
out (hyper).

D hidden, E experts, H width of the network, U replicas.
"""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array
from jax.sharding import PartitionSpec as P

from bigmac_jax.config import Config
from bigmac_jax.model.gathering import Weight
from bigmac_jax.model.mesh import REPLICA
from bigmac_jax.model.parameters import Declaration, parameter, weight

_STD = 0.02  # of the network's weights, as in the code of its paper
# W and b, whatever they come from.
_MATRIX = Declaration("DE", "router", 0, exact=True)
_BIAS = Declaration("E", "router", 0, constant=True, decays=False, small=True, exact=True)


class HyperRouter(nnx.Module):
    """HyperRouter (Do et al. 2023, arXiv 2312.07035): a frozen random network makes W and b from one trained vector.

        (W, b) = relu(v in_DH) out,   v ~ N(0, 1) trained,   in_DH and out ~ N(0, 0.02²) frozen, no biases

    Where the paper has one Linear(H → E · (D + 1)), its columns for W and for b stand apart here. Its gates, a softmax
    over the chosen experts alone, are those of router_scores=softmax with router_renormalize.
    """

    def __init__(self, config: Config, key: Array):
        self.config = config
        m = config.model
        D, E, H = m.hidden_size, m.expert_count, m.hyper_width
        keys = jax.random.split(key, 4)
        frozen = functools.partial(Declaration, part="router", value=_STD, exact=True, trained=False)
        self.vector_D = parameter(
            config, keys[0], (D,), Declaration("D", "router", 1, decays=False, small=True, exact=True)
        )
        self.in_DH = parameter(config, keys[1], (D, H), frozen("DH", small=True))
        self.out_DHE = parameter(config, keys[2], (D, H, E), frozen("DHE", pads=False))
        self.out_HE = parameter(config, keys[3], (H, E), frozen("HE", small=True))

    def make(self) -> tuple[Array, Array]:
        """Makes W and b, once in a pass over the layer: w_DE, sharded as a linear router's, and b_E; both [U, …] where
        each replica has its own vector."""
        exact = functools.partial(jnp.einsum, precision=jax.lax.Precision.HIGHEST)
        vector_D, out_DHE = self.vector_D.get_value(), self.out_DHE.get_value()
        h_H = jax.nn.relu(exact("...D,DH->...H", vector_D, self.in_DH.get_value()))
        mesh = jax.sharding.get_abstract_mesh()
        if not mesh.empty:  # no rank adds up another's part of H
            D, _, E = out_DHE.shape
            rows, columns = dataclasses.replace(_MATRIX, pads=False).spec((D, E), self.config.mesh.fsdp, mesh.shape)
            out_DHE = jax.sharding.reshard(out_DHE, P(rows, None, columns))
        return exact("...H,DHE->...DE", h_H, out_DHE), exact("...H,HE->...E", h_H, self.out_HE.get_value())

    def weights(self) -> list[Weight]:
        """W and b, for `on_each_rank`."""
        execution, of_replica = self.config.execution, self.vector_D.get_value().ndim > 1
        split = (REPLICA,) if of_replica else ()
        w_DE, b_E = self.make()
        return [Weight(w_DE, _MATRIX.crossing(execution), split), Weight(b_E, _BIAS.crossing(execution), split)]


def router_parameters(
    config: Config, key: Array
) -> tuple[nnx.Variable | None, nnx.Variable | None, HyperRouter | None]:
    """Declares what model.router asks for: router_DE, router_logit_bias_E, and the network in their place."""
    m = config.model
    if m.router == "hyper":
        return None, None, HyperRouter(config, key)
    matrix = dataclasses.replace(_MATRIX, value=1 / math.sqrt(m.hidden_size), trained=m.router != "frozen")
    router_DE = parameter(config, key, (m.hidden_size, m.expert_count), matrix)
    return router_DE, parameter(config, None, (m.expert_count,), _BIAS) if m.router == "affine" else None, None


def router_weights(
    config: Config, router_DE: nnx.Variable | None, router_logit_bias_E: nnx.Variable | None, hyper: HyperRouter | None
) -> list[Weight]:
    """w_DE, and where there is one b_E, for `score_experts`."""
    if hyper is not None:
        return hyper.weights()
    return [weight(config, variable) for variable in (router_DE, router_logit_bias_E) if variable is not None]
