"""Collectives that CPU devices of jax up to 0.11 may mix up are found in a program's text, and named in one line."""

import jax
import pytest

from bigmac_jax.runtime import collective_order
from bigmac_jax.runtime.collective_order import beside_loops

# A loop that gathers, one that does not, and behind them what needs the first one's result and what does not.
PROGRAM = """HloModule jit_step, is_scheduled=true

%body (p: (s32[], f32[4])) -> (s32[], f32[4]) {
  %p = (s32[], f32[4]{0}) parameter(0)
  %x = f32[4]{0} get-tuple-element(%p), index=1
  %g = f32[4]{0} all-gather(%x), channel_id=1, dimensions={0}
  ROOT %t = (s32[], /*index=1*/f32[4]{0}) tuple(%i, %g)
}

%quiet (p.1: (s32[], f32[4])) -> (s32[], f32[4]) {
  ROOT %p.1 = (s32[], f32[4]{0}) parameter(0)
}

ENTRY %main (a: f32[4], b: f32[4]) -> f32[4] {
  %a = f32[4]{0} parameter(0)
  %b = f32[4]{0} parameter(1)
  %before = f32[4]{0} all-reduce(%b), to_apply=%add
  %start = (s32[], f32[4]{0}) tuple(%zero, %a)
  %loop = (s32[], f32[4]{0}) while(%start), condition=%less, body=%body, metadata={op_name="%b"}
  %calm = (s32[], f32[4]{0}) while(%start), condition=%less, body=%quiet
  %y = f32[4]{0} get-tuple-element(%loop), index=1
  BEHIND
  ROOT %sum = f32[4]{0} add(%y, %z)
}
"""


@pytest.mark.parametrize(
    ("behind", "expected"),
    [
        ("%z = f32[4]{0} all-reduce(%y), to_apply=%add", []),  # needs it
        ("%z = f32[4]{0} negate(%b)", []),  # sends nothing
        ("%z = f32[4]{0} reduce-scatter(%b), to_apply=%add", [("loop", "z")]),
        ("%z = f32[4]{0} all-reduce(%b), metadata={op_name=\"of %y\"}", [("loop", "z")]),  # a name is no operand
        ("%w = (s32[], f32[4]{0}) while(%start), condition=%less, body=%body", [("loop", "w")]),
        ("%w = (s32[], f32[4]{0}) while(%start), condition=%less, body=%quiet", []),
        ("%z = f32[4]{0} all-gather(%calm), dimensions={0}", [("loop", "z")]),  # another loop's result
    ],
)  # fmt: skip
def test_what_runs_beside_a_loop(behind: str, expected: list) -> None:
    assert beside_loops(PROGRAM.replace("BEHIND", behind)) == expected


@pytest.mark.parametrize(("version", "said"), [((0, 10, 2), True), ((0, 11, 0), True), ((0, 12, 0), False)])
def test_one_line(version: tuple[int, ...], said: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jax, "__version_info__", version)
    monkeypatch.setattr(jax, "__version__", "0.1")
    text = PROGRAM.replace("BEHIND", "%z = f32[4]{0} all-reduce(%b), to_apply=%add")
    assert collective_order.note("step", text) == said * (
        "the step's numbers may be wrong: the CPU devices of jax 0.1 may mix up z and what loop sends; Python 3.12 and "
        "later install jax 0.12, which does not"
    )
    assert not collective_order.note("step", PROGRAM)
