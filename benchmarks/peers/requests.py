"""A worker of benchmarks.serve: transformers' own batches of requests, in an environment with torch and transformers.

Started as python -m benchmarks.peers.requests MODEL REQUESTS BATCH WAY. MODEL is a folder that `from_pretrained` reads;
REQUESTS a file of JSON, [[tokens of a prompt, tokens to generate], …]. WAY `continuous` is its continuous batching,
which gets all at once; `static` is `generate` on BATCH of them after the other, each batch to the end of its longest.
"""

import json
import os
import pathlib
import sys
import time

import torch
import transformers

from benchmarks.peers import serve

Requests = list[tuple[list[int], int]]


def main() -> None:
    path, file, batch, way = sys.argv[1:5]
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    model = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    requests = json.loads(pathlib.Path(file).read_text())
    play = continuous if way == "continuous" else static

    def run() -> float:
        start = time.perf_counter()
        with torch.inference_mode():
            play(model, requests, int(batch))
        return time.perf_counter() - start

    serve(sum(p.numel() for p in model.parameters()), run)


def continuous(model: transformers.PreTrainedModel, requests: Requests, batch: int) -> None:
    config = transformers.GenerationConfig(do_sample=False, eos_token_id=-1, pad_token_id=0)
    sizes = transformers.ContinuousBatchingConfig(max_batch_tokens=64 * batch)
    with model.continuous_batching_context_manager(config, continuous_batching_config=sizes) as manager:
        wanted = {manager.add_request(prompt, max_new_tokens=new): new for prompt, new in requests}
        while wanted:
            result = manager.get_result(timeout=60)
            assert result is not None and result.error is None, result
            if result.is_finished():
                assert len(result.generated_tokens) == wanted.pop(result.request_id)


def static(model: transformers.PreTrainedModel, requests: Requests, batch: int) -> None:
    for first in range(0, len(requests), batch):
        prompts, lengths = zip(*requests[first : first + batch], strict=True)
        longest, new = max(map(len, prompts)), max(lengths)
        tokens = torch.tensor([[0] * (longest - len(prompt)) + prompt for prompt in prompts])
        mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts])
        out = model.generate(
            tokens, attention_mask=mask, do_sample=False, min_new_tokens=new, max_new_tokens=new, pad_token_id=0
        )
        assert out.shape == (len(prompts), longest + new)


if __name__ == "__main__":
    main()
