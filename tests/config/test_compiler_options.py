"""execution.compiler_options: what it says, and what a config of someone else may not."""

import pytest

from bigmac_jax.config import ConfigError, load_config
from bigmac_jax.config.compiler_options import parse_options


def test_values() -> None:
    text = "xla_tpu_a=true xla_b=false  xla_c=-3 xla_d=0.5 xla_disable_hlo_passes=fusion,some-pass_2"
    assert parse_options(text) == {
        "xla_tpu_a": True, "xla_b": False, "xla_c": -3, "xla_d": 0.5, "xla_disable_hlo_passes": "fusion,some-pass_2",
    }  # fmt: skip
    assert parse_options("") == {}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("xla_a", "'xla_a' must be xla_NAME=VALUE, as in"),
        ("--xla_a=1", "'--xla_a=1' must be xla_NAME=VALUE"),
        ("xla_a=1 xla_a=2", "has xla_a twice; keep one"),
        ("xla_a=", "xla_a='' must be true, false or a number"),
        ("xla_a=1e9", "xla_a='1e9' must be true, false or a number"),
        ("xla_a=True", "xla_a='True' must be true, false or a number"),
        ("xla_gpu_kernel_cache_file=/tmp/x", "xla_gpu_kernel_cache_file='/tmp/x' must be true, false or a number"),
        ("xla_gpu_cuda_data_dir=here", "xla_gpu_cuda_data_dir='here' must be true, false or a number"),
        ("xla_disable_hlo_passes=../x", "xla_disable_hlo_passes='../x' must be words between commas"),
        (
            "xla_dump_hlo_as_text=true",
            "xla_dump_hlo_as_text writes files, which a config must not; set it",
        ),
    ],
)
def test_what_is_refused(text: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config("tiny", [f"execution.compiler_options={text}"])
    assert message in str(caught.value) and "\n" not in str(caught.value)
