"""A worker of benchmarks.decode: transformers' own generate, in an environment with torch and transformers.

Started as python -m benchmarks.peers.generate MODEL BATCH PROMPT NEW; MODEL is a folder that `from_pretrained` reads.
"""

import os
import sys
import time

import torch
import transformers

from benchmarks.peers import serve


def main() -> None:
    path, (batch, prompt, new) = sys.argv[1], map(int, sys.argv[2:5])
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    model = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    tokens = torch.randint(model.config.vocab_size, (batch, prompt), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(tokens)

    def generate() -> float:
        start = time.perf_counter()
        with torch.inference_mode():
            out = model.generate(
                tokens, attention_mask=mask, do_sample=False, min_new_tokens=new, max_new_tokens=new, pad_token_id=0
            )
        assert out.shape == (batch, prompt + new)
        return time.perf_counter() - start

    serve(sum(p.numel() for p in model.parameters()), generate)


if __name__ == "__main__":
    main()
