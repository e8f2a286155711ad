"""A process that prepares a corpus in small units: preparing.py SOURCE CACHE_DIR TOKENIZER PROCESSES."""

import sys

from bigmac_jax.config import Config, DataConfig, ModelConfig
from bigmac_jax.data import local_files, token_shards, workers
from bigmac_jax.data.pipeline import prepare

if __name__ == "__main__":
    source, folder, name, processes = sys.argv[1:]
    workers._ALONE, local_files.UNIT = 0, 1 << 18
    data = DataConfig(source=source, tokenizer=name, validation_source="-", test_source="-")
    config = Config(data=data, cache_dir=folder, model=ModelConfig(vocab_size=400))
    print(*prepare(config, ["train"], int(processes)), sep="\n", flush=True)
    assert token_shards.SHARD == 1 << 25
