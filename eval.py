"""Scores a trained model: python eval.py --workdir=DIR [--step=best] [--split=test | --text_file=PATH] [--json]."""

from bigmac_jax import environment

environment.prepare()

import json  # noqa: E402
import pathlib  # noqa: E402

import tqdm  # noqa: E402
from absl import flags  # noqa: E402

from bigmac_jax import cli, hosts  # noqa: E402
from bigmac_jax.config import ConfigError, with_mesh  # noqa: E402
from bigmac_jax.data.pipeline import open_stream, text_stream  # noqa: E402
from bigmac_jax.data.tokenizer import load_tokenizer  # noqa: E402
from bigmac_jax.evaluation.perplexity import evaluate  # noqa: E402
from bigmac_jax.training.checkpoint import read_config, restore  # noqa: E402
from bigmac_jax.watch import Watch  # noqa: E402

_WORKDIR = flags.DEFINE_string("workdir", "runs/tiny", "A run of train.py.")
_STEP = flags.DEFINE_string("step", "latest", "latest, best (by eval/loss) or the number of a checkpoint.")
_SPLIT = flags.DEFINE_string("split", "test", "train, validation or test.")
_TEXT_FILE = flags.DEFINE_string("text_file", "", "Score this file instead of a split.")
_BATCH_SIZE = flags.DEFINE_integer("batch_size", 0, "Sequences at a time; 0 takes the run's.", lower_bound=0)
_JSON = flags.DEFINE_bool("json", False, "Print the JSON object alone.")


def main() -> None:
    workdir = pathlib.Path(_WORKDIR.value)
    with hosts.together():
        saved = read_config(workdir)
        config = with_mesh(saved, cli.OVERRIDES)
        if _SPLIT.value not in ("train", "validation", "test"):
            raise ConfigError(f"--split={_SPLIT.value} must be train, validation or test")
        tokenizer = load_tokenizer(config)
        text_file = _TEXT_FILE.value and pathlib.Path(_TEXT_FILE.value)
        stream = text_stream(text_file, tokenizer) if text_file else open_stream(config, _SPLIT.value, tokenizer)
    cli.enter_mesh(config, fit_batch=False)
    with Watch(workdir, flags.FLAGS.peer_timeout, kind="eval") as watch:
        _, model = restore(workdir, _STEP.value, config)
        quiet = _JSON.value or not hosts.is_first()
        with tqdm.tqdm(total=stream.num_tokens - 1, unit="token", unit_scale=True, disable=quiet) as bar:

            def done(tokens: int) -> None:
                bar.update(tokens)
                watch.advance()

            size = _BATCH_SIZE.value or saved.data.batch_size
            score = evaluate(model, stream, config.data.sequence_length, size, done)
    if not _JSON.value:
        hosts.say(
            f"{text_file or _SPLIT.value}: perplexity {score.perplexity:.3f}, {score.bits_per_byte:.4f} bits per byte, "
            f"perplexity a word {score.word_perplexity:,.1f} "
            f"({score.tokens:,} tokens, {score.words:,} words, {score.bytes:,} bytes)"
        )
    hosts.say(json.dumps(score._asdict()))


if __name__ == "__main__":
    cli.run(main, distributed=True)
