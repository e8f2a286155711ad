"""Serves a trained model over HTTP, with OpenAI's interface: bigmac serve --workdir=DIR [--port=8000].

/v1/completions, /v1/chat/completions, /v1/models, /metrics, /health, and a page to chat at /. It ends on SIGTERM or
Ctrl-C when the requests that run have ended. Of several processes the first one serves, and the others compute with it.
"""

import asyncio
import pathlib

from absl import flags

from bigmac_jax.commands import cli, decoding_flags
from bigmac_jax.config import ConfigError
from bigmac_jax.inference.engine import count_pages
from bigmac_jax.runtime import hosts
from bigmac_jax.runtime.progress import Waiting
from bigmac_jax.runtime.storage import absolute
from bigmac_jax.serving.dialogue import load_dialogue
from bigmac_jax.serving.limits import Limits, finite_seconds
from bigmac_jax.serving.lockstep import follow
from bigmac_jax.serving.server import listen, serve
from bigmac_jax.training.workdir import load_run_tokenizer, locate_workdir, use_saved_tokenizer

flags.adopt_module_key_flags(decoding_flags)
_HOST = flags.DEFINE_string("host", "127.0.0.1", "The address to listen at; 0.0.0.0 is all of this machine's.")
_PORT = flags.DEFINE_integer("port", 8000, "0 takes a free one.", 0, 65535)
_MODEL_NAME = flags.DEFINE_string("model_name", "", "What requests call the model; by default the workdir's name.")
_API_KEY_FILE = flags.DEFINE_string("api_key_file", "", "A file with the key that requests must bring.")
_ALLOW_HOST = flags.DEFINE_list(
    "allow_host", [], "Without a key: names that it may be called by, beside addresses, localhost and this machine's."
)
_CHAT_TEMPLATE = flags.DEFINE_string("chat_template", "", "A Jinja file that makes a prompt of messages.")
_CACHE_TOKENS = flags.DEFINE_integer("cache_tokens", 0, "Room of the cache; 0 = batch_size × max_length.", 0)
_CHUNK = flags.DEFINE_integer("chunk", 512, "Tokens of prompts that are read between two steps, a batch shard.", 1)
_QUEUE = flags.DEFINE_integer("queue", Limits.queue, "Completions that may wait for a slot; more are answered 429.", 0)
_TIMEOUT = flags.DEFINE_float("timeout", Limits.seconds, "Seconds of a request, at most.", 0.01)
_ARRIVAL = flags.DEFINE_float("arrival", Limits.arrival, "Seconds for the head of a request, and for its body.", 0.01)
_MAX_BODY = flags.DEFINE_integer("max_body", Limits.body, "Bytes of a request, at most.", 1)
_MAX_CHOICES = flags.DEFINE_integer("max_choices", Limits.choices, "Completions of one request, at most.", 1)
_DRAIN = flags.DEFINE_float("drain", Limits.drain, "Seconds that running requests get at the end.", 0)


def main() -> int:
    with hosts.raise_together():
        workdir = locate_workdir(decoding_flags.WORKDIR.value)
        config = decoding_flags.read_run(workdir)
        limits = Limits(
            body=_MAX_BODY.value,
            queue=_QUEUE.value,
            choices=_MAX_CHOICES.value,
            seconds=finite_seconds("timeout", _TIMEOUT.value),
            arrival=finite_seconds("arrival", _ARRIVAL.value),
            drain=finite_seconds("drain", _DRAIN.value),
        )
        speculate, tokenizer = decoding_flags.speculation(), load_run_tokenizer(workdir, config)
        kept = use_saved_tokenizer(workdir, config).data.tokenizer  # beside which a template may stand
        chat = load_dialogue(tokenizer, _CHAT_TEMPLATE.value, kept, workdir)
        if hosts.is_first():
            key, listening = _key(_API_KEY_FILE.value), listen(_HOST.value, _PORT.value)
    cli.agree(config, __name__)
    with Waiting("reading the model", not hosts.is_first()):
        config = decoding_flags.enter_mesh(config, speculate)
        if _CACHE_TOKENS.value:
            count_pages(_CACHE_TOKENS.value, decoding_flags.max_length(config))
        generator = decoding_flags.load_generator(workdir, config, speculate, tokenizer)
    engine = generator.engine(decoding_flags.BATCH_SIZE.value, positions=_CACHE_TOKENS.value, chunk=_CHUNK.value)
    with Waiting("compiling", not hosts.is_first()):
        engine.compile()
    if not hosts.is_first():
        return follow(generator, engine)
    name = _MODEL_NAME.value or absolute(workdir).name
    return asyncio.run(serve(generator, engine, chat, name, limits, listening, key, [*_ALLOW_HOST.value, _HOST.value]))


def _key(file: str) -> str:
    if not file:
        return ""
    try:
        key = pathlib.Path(file).expanduser().read_text().strip()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"--api_key_file={file} cannot be read ({error}); give a file with the key") from None
    if not key:
        raise ConfigError(f"--api_key_file={file} is empty; write a key into it")
    if not key.isprintable():
        raise ConfigError(f"--api_key_file={file} must hold one line that a header can carry; write one key into it")
    return key
