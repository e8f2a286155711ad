"""The step and the evaluation as values: a run calls them, the planner compiles them for machines that are not there.

B batch, L length.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from bigmac_jax.config import Config
from bigmac_jax.data.batch import Batch
from bigmac_jax.model.mesh import batch_spec, replicated_spec
from bigmac_jax.model.transformer import Transformer
from bigmac_jax.runtime import hosts
from bigmac_jax.training.loss import TokenScores, token_scores
from bigmac_jax.training.step import Trainer


@hosts.Jit
def evaluate(model: Transformer, batch: Batch) -> TokenScores:
    """Scores the targets of a batch, on every process; logits are not held whole."""
    return jax.tree.map(lambda v: jax.sharding.reshard(v, replicated_spec(v.ndim)), token_scores(model, batch))


def evaluation_rows(config: Config) -> int:
    """Sequences that an evaluation scores at a time: as many as a step computes at a time."""
    return config.data.batch_size // config.train.accumulate_steps


class Program(NamedTuple):
    """A program before it is compiled.

    Attributes:
      function: jitted; what a run calls.
      arguments: abstract arrays on the mesh.
      static: keyword arguments.
      beside: abstract arrays that are in memory while it runs though it is not given them.
    """

    name: str
    function: Any
    arguments: tuple[Any, ...]
    static: dict[str, Any]
    beside: Any = ()

    def lower(self) -> Any:
        """Lowers the function for its arguments, to be compiled."""
        return self.function.lower(*self.arguments, **self.static)


def step_program(config: Config, mesh: Mesh, trainer: Trainer) -> Program:
    """The training step with the abstract arguments that it takes."""
    batch = abstract_batch(config.data.batch_size, config, mesh, training=True)
    rate = abstract(mesh, replicated_spec(0), dtype=jnp.float32)
    return Program("step", trainer.step, (trainer.abstract_state, batch, rate), {})


def abstract(mesh: Mesh, spec: P, *shape: int, dtype: Any = jnp.int32) -> Any:
    """An abstract array on a mesh."""
    return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, spec))


def abstract_batch(rows: int, config: Config, mesh: Mesh, training: bool = False) -> Batch:
    """A batch of abstract arrays, as a step takes it (`training`) or an evaluation."""
    tokens_BL = abstract(mesh, batch_spec(2), rows, config.data.sequence_length)
    own = config.tuning.objective == "dpo" and not config.tuning.lora_rank
    reference_BL = abstract(mesh, batch_spec(2), *tokens_BL.shape, dtype=jnp.float32) if own and training else None
    return Batch(tokens_BL, tokens_BL, tokens_BL if config.has_segments else None, reference_BL)
