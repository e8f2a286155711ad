"""A process that tokenises, for tests: tokenise.py SOURCE CACHE_DIR TOKENIZER [stop]; `stop` hangs half-way."""

import logging
import sys
import time

import tiny_dataset  # noqa: F401  registers the datasets

from bigmac_jax.config import Config, DataConfig, ModelConfig
from bigmac_jax.data import token_cache, token_shards
from bigmac_jax.data.pipeline import open_stream
from bigmac_jax.data.tokenizer import ByteTokenizer, load_tokenizer


class Stops(ByteTokenizer):
    batches = 0

    def arrays(self, texts):
        self.batches += 1
        if self.batches == 3:
            print("half-way", flush=True)
            time.sleep(600)
        return super().arrays(texts)


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, stream=sys.stdout, force=True)  # absl may hold the root logger
    source, folder, name, *stop = sys.argv[1:]
    if stop:  # in the third batch, behind the first shard
        token_shards.SHARD = token_cache.SHARD = 1 << 20
    field = "body" if source.startswith("tfds:") else "text"
    own = {"validation_source": "-", "test_source": "-"} if stop else {}
    data = DataConfig(source=source, text_field=field, tokenizer=name, **own)
    config = Config(data=data, cache_dir=folder, model=ModelConfig(vocab_size=500))
    tokenizer = Stops() if stop else load_tokenizer(config)
    print("result", tokenizer.fingerprint, open_stream(config, "train", tokenizer).num_tokens)
