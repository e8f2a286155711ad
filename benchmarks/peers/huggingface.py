"""A worker of benchmarks.peers: Hugging Face transformers on torch, in an environment of their own.

Started as python -m benchmarks.peers.huggingface MODEL[:EXPERTS[:compile|eager]] STEPS.
"""

import os
import sys
import time

import torch
import transformers

from benchmarks.peers import B1, B2, LEARNING_RATE, SHAPE, WEIGHT_DECAY, serve

_ATTENTION = {
    "vocab_size": SHAPE.vocab_size,
    "hidden_size": SHAPE.hidden_size,
    "num_attention_heads": SHAPE.num_heads,
    "num_key_value_heads": SHAPE.num_heads,
    "head_dim": SHAPE.head_size,
    "attn_implementation": "sdpa",
    "use_cache": False,
}


def qwen3_moe(experts: str) -> transformers.PreTrainedModel:
    """Gated experts h → r·h → h, silu, softmax router, rotary positions, query-key norm."""
    config = transformers.Qwen3MoeConfig(
        **_ATTENTION,
        num_hidden_layers=SHAPE.num_layers,
        num_experts=SHAPE.num_experts,
        num_experts_per_tok=SHAPE.top_k,
        moe_intermediate_size=SHAPE.latent_size,
        norm_topk_prob=True,
        experts_implementation=experts,
    )
    return transformers.Qwen3MoeForCausalLM(config)


def nemotron_h(experts: str) -> transformers.PreTrainedModel:
    """LatentMoE: experts r·h → h → r·h between two projections, relu2, sigmoid router; no Mamba layers."""
    config = transformers.NemotronHConfig(
        **_ATTENTION,
        layers_block_type=["full_attention", "moe"] * SHAPE.num_layers,
        n_routed_experts=SHAPE.num_experts,
        num_experts_per_tok=SHAPE.top_k,
        moe_latent_size=SHAPE.latent_size,
        moe_intermediate_size=SHAPE.hidden_size,
        moe_shared_expert_intermediate_size=SHAPE.latent_size,  # it can't be turned off
        experts_implementation=experts,
    )
    return transformers.NemotronHForCausalLM(config)


def main() -> None:
    name, experts, mode = [*sys.argv[1].split(":"), "grouped_mm", "compile"][:3]
    steps = int(sys.argv[2])
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    torch.manual_seed(0)
    model = {"qwen3_moe": qwen3_moe, "nemotron_h": nemotron_h}[name](experts).train()
    parameters = sum(p.numel() for p in model.parameters())
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=LEARNING_RATE, betas=(B1, B2), weight_decay=WEIGHT_DECAY, fused=True
    )
    forward = torch.compile(model) if mode == "compile" else model
    tokens_BL = torch.randint(SHAPE.vocab_size, (SHAPE.batch_size, SHAPE.sequence_length + 1))
    inputs_BL, targets_BL = tokens_BL[:, :-1].contiguous(), tokens_BL[:, 1:].contiguous()

    def round_of_steps() -> float:
        start = time.perf_counter()
        for _ in range(steps):
            optimizer.zero_grad(set_to_none=True)
            forward(input_ids=inputs_BL, labels=targets_BL, shift_labels=targets_BL).loss.backward()
            optimizer.step()
        return (time.perf_counter() - start) / steps

    serve(parameters, round_of_steps)


if __name__ == "__main__":
    main()
