"""Small models of transformers' NemotronH. Needs the extra `hf`."""

import itertools
from typing import Any

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers", minversion="5.24")

KINDS = {"*": "full_attention", "M": "linear_attention", "E": "moe", "-": "mlp"}
SIZES = {
    "vocab_size": 257, "hidden_size": 32, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8,
    "n_routed_experts": 8, "num_experts_per_tok": 4, "moe_intermediate_size": 24, "intermediate_size": 40,
    "moe_shared_expert_intermediate_size": 20, "mamba_num_heads": 8, "mamba_head_dim": 8, "n_groups": 8,
    "ssm_state_size": 16, "time_step_min": 0.3, "chunk_size": 16, "layer_norm_epsilon": 1e-3,
}  # fmt: skip


def their_model(pattern: str, **fields: Any) -> Any:
    """One that transformers initialised, with biases, norms and steps that are felt: some of the steps are clamped.

    Args:
      pattern: its blocks, as in `model.blocks`.
      **fields: of its config, over `SIZES`.
    """
    kinds = [KINDS[letter] for letter in pattern]
    torch.manual_seed(0)
    theirs = transformers.NemotronHForCausalLM(
        transformers.NemotronHConfig(**SIZES | fields, layers_block_type=kinds)
    ).eval()
    with torch.no_grad():
        for parameter, value in itertools.chain(theirs.named_parameters(), theirs.named_buffers()):
            if value.ndim > 1:
                value.mul_(2 if "mamba" in parameter else 4)  # logits of the size that trained ones have
            else:
                value.add_(0.2 * torch.randn_like(value) - (1.5 if "dt_bias" in parameter else 0))
    return theirs
