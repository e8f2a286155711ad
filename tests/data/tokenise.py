"""A process that tokenises, for tests: tokenise.py SOURCE CACHE_DIR TOKENIZER [stop]; `stop` hangs half-way."""

import logging
import sys
import time

import tiny_dataset  # noqa: F401  registers the datasets

from bigmac_jax.config import Config, DataConfig, ModelConfig
from bigmac_jax.data.pipeline import open_stream
from bigmac_jax.data.tokenizer import ByteTokenizer, load_tokenizer


class Stops(ByteTokenizer):
    batches = 0

    def encode_batch(self, texts):
        self.batches += 1
        if self.batches == 3:
            print("half-way", flush=True)
            time.sleep(600)
        return super().encode_batch(texts)


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, stream=sys.stdout, force=True)  # absl may hold the root logger
    source, cache, name, *stop = sys.argv[1:]
    field = "body" if source.startswith("tfds:") else "text"
    data = DataConfig(source=source, text_field=field, tokenizer=name)
    config = Config(data=data, cache_dir=cache, model=ModelConfig(vocab_size=500))
    tokenizer = Stops() if stop else load_tokenizer(config)
    print("result", tokenizer.fingerprint, open_stream(config, "train", tokenizer).num_tokens)
