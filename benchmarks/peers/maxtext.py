"""A worker of benchmarks.peers: MaxText's Qwen3-MoE, the peer of `fine_grained`, in an environment of its own.

Started as python -m benchmarks.peers.maxtext maxtext STEPS. The step is that of MaxText's own loop, on one batch of its
synthetic data.
"""

import os
import pathlib
import sys
import tempfile
import time

os.environ["DECOUPLE_GCLOUD"] = "TRUE"  # before the import: no Google Cloud clients

import jax
import maxtext
from flax import nnx
from flax.core.spmd import logical_axis_rules
from maxtext.trainers.pre_train import train
from maxtext.utils import sharding, train_utils

from benchmarks.peers import B1, B2, LEARNING_RATE, SHAPE, WEIGHT_DECAY, serve

SETTINGS = {
    "run_name": "peers",
    "hardware": "cpu",
    "skip_jax_distributed_system": True,
    "dataset_type": "synthetic",
    "enable_checkpointing": False,
    "enable_goodput_recording": False,
    "decoder_block": "qwen3_moe",
    "base_num_decoder_layers": SHAPE.num_layers,
    "base_emb_dim": SHAPE.hidden_size,
    "base_num_query_heads": SHAPE.num_heads,
    "base_num_kv_heads": SHAPE.num_heads,
    "head_dim": SHAPE.head_size,
    "base_mlp_dim": SHAPE.latent_size,
    "base_moe_mlp_dim": SHAPE.latent_size,
    "num_experts": SHAPE.num_experts,
    "num_experts_per_tok": SHAPE.top_k,
    "norm_topk_prob": True,
    "load_balance_loss_weight": 0.0,
    "mlp_activations": "['silu','linear']",
    "use_qk_norm": True,
    "logits_via_embedding": False,
    "vocab_size": SHAPE.vocab_size,
    "max_target_length": SHAPE.sequence_length,
    "per_device_batch_size": SHAPE.batch_size,
    "packing": False,
    "dtype": "float32",
    "weight_dtype": "float32",
    "learning_rate": LEARNING_RATE,
    "adam_b1": B1,
    "adam_b2": B2,
    "adam_weight_decay": WEIGHT_DECAY,
    # The fastest on CPU of those tried: every expert computes every token, which beats its ragged products there.
    "attention": "dot_product",
    "sparse_matmul": False,
    "megablox": False,
    "remat_policy": "minimal_with_context",
}


def main() -> None:
    steps = int(sys.argv[2])
    base = pathlib.Path(maxtext.__file__).parent / "configs" / "base.yml"
    settings = SETTINGS | {"base_output_directory": tempfile.gettempdir()}  # it writes nothing without checkpoints
    config, recorder = train.initialize(["", str(base), *(f"{name}={value}" for name, value in settings.items())])
    _, _, shardings, _, mesh, _, _, loader, _, _, state = train_utils.setup_train_loop(config, recorder)
    graphdef, state = nnx.split(state)
    params_shardings, shardings = sharding.maybe_update_params_sharding_with_opt(config, shardings)
    step, _ = train_utils.jit_train_and_eval_step(
        config, graphdef, mesh, state, shardings, train.train_step, None, None, params_shardings
    )
    batch = loader.load_next_batch()
    _, params, _ = nnx.split(state.model, nnx.Param, ...)
    parameters = sum(leaf.size for leaf in jax.tree.leaves(params))

    def round_of_steps() -> float:
        nonlocal state
        start = time.perf_counter()
        for _ in range(steps):
            state, metrics = step(state, batch)
        jax.block_until_ready(metrics)
        return (time.perf_counter() - start) / steps

    with jax.set_mesh(mesh), logical_axis_rules(config.logical_axis_rules):
        serve(parameters, round_of_steps)


if __name__ == "__main__":
    main()
