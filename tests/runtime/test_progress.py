"""Without a terminal there are plain lines, and only now and then."""

import os
import pathlib
import signal
import time

import pytest

from bigmac_jax.runtime import progress, signals
from bigmac_jax.runtime.progress import Progress, Waiting
from bigmac_jax.training.metrics import MetricsWriter


def test_plain_lines(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    with Progress("piqa", 4, "window", initial=1) as bar:
        bar.update(1)
        assert capsys.readouterr().err == ""  # not every update
        monkeypatch.setattr(progress, "_EVERY", -1.0)
        bar.update(1)
        assert capsys.readouterr().err == "piqa: 75% of 4 windows, 0 s\n"
        monkeypatch.undo()
        bar.update(1)
    assert capsys.readouterr().err == "piqa: 100% of 4 windows, 0 s\n"


@pytest.mark.parametrize(("seconds", "said"), [(200, "50.0 s each"), (2, "2 a second"), (0.002, "2,000 a second")])
def test_a_rate_is_never_nought(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, seconds: float, said: str
) -> None:
    """Of units that take longer than a second each, that time is said."""
    now = 100.0
    monkeypatch.setattr(progress.time, "monotonic", lambda: now)
    with Progress("reference", 4 if seconds > 1 else 4000, "window") as bar:
        now += max(seconds, 2)
        bar.update(4 if seconds > 1 else 4000)
    assert capsys.readouterr().err.endswith(f" windows, {max(seconds, 2)} s, {said}\n")


@pytest.mark.parametrize(
    ("seconds", "initial", "count", "total", "said"),
    [
        (10, 0, 100, 200, "50% of 200 us, 10 s, 10 a second, 10 s left"),
        (10, 0, 95, 200, "48% of 200 us, 10 s, 9.5 a second, 11 s left"),
        (10, 0, 10, 15, "67% of 15 us, 10 s, 1 a second, 5 s left"),
        (10, 0, 8, 18, "44% of 18 us, 10 s, 1.2 s each, 12 s left"),
        (10, 5, 10, 15, "100% of 15 us, 10 s, 1 a second"),
        (1, 0, 5, 10, "50% of 10 us, 1 s"),
        (1.5, 0, 6, 0, "6 us, 2 s, 4 a second"),
        (10, 3, 0, 9, "33% of 9 us, 10 s"),
    ],
)  # fmt: skip
def test_a_line_by_hand(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, seconds: float, initial: int, count: int,
    total: int, said: str,
) -> None:  # fmt: skip
    """The rate is of what was done here; it is said from a second on."""
    now = 100.0
    monkeypatch.setattr(progress.time, "monotonic", lambda: now)
    with Progress("t", total, "u", initial=initial) as bar:
        now += seconds
        bar.update(count)
    assert capsys.readouterr().err == f"t: {said}\n"


def test_lines_come_every_half_a_minute_and_from_the_delay_on(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was said is not said again at the end."""
    now = 100.0
    monkeypatch.setattr(progress.time, "monotonic", lambda: now)
    lines = []
    with Progress("t", 9, "u") as bar:
        for seconds in (30, 1, 30, 31):
            now += seconds
            bar.update()
            lines.append(capsys.readouterr().err.partition(",")[0])
    assert lines == ["", "t: 22% of 9 us", "", "t: 44% of 9 us"] and capsys.readouterr().err == ""
    for seconds in (4.5, 5):
        with Progress("t", 9, "u", delay=5) as bar:
            now += seconds
            bar.update()
        assert bool(capsys.readouterr().err) == (seconds == 5)


def test_what_is_waited_for_is_said(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Plain lines after a while; nothing where it is short; on a terminal a line at once, which is gone afterwards."""
    with Waiting("compiling"), Waiting("reading", silent=True):
        pass
    assert capsys.readouterr().err == ""
    monkeypatch.setattr(progress, "_PATIENCE", 0.01)
    with Waiting("compiling"):
        time.sleep(0.1)
    assert capsys.readouterr().err == "compiling: 0 s\n"
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    with Waiting("compiling") as waiting:
        time.sleep(0.1)
        waiting.end()
        shown = capsys.readouterr().err
    assert "compiling, 0 s" in shown and shown.rpartition("\r")[2].strip() == ""


def test_the_bar_of_a_run_says_that_it_compiles(
    tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    writer = MetricsWriter(tmp_path, 0, 40)
    with writer.waiting("compiling the step"):
        time.sleep(0.1)
    assert "0/40 [00:00<?, ?step/s, compiling the step, 0 s]" in (before := capsys.readouterr().err)
    assert "compiling" not in before.rpartition("\r")[2]
    writer.close()


def test_short_and_silent_jobs_say_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    for bar in (Progress("tokenising", 2, "byte", delay=2), Progress("piqa", 2, "window", silent=True)):
        with bar:
            bar.update(2)
    with pytest.raises(KeyError), Progress("piqa", 2, "window") as bar:
        raise KeyError  # what was not finished is not said to be
    assert capsys.readouterr().err == ""


def test_a_terminal_gets_a_bar(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    with Progress("piqa", 2, "window") as bar:
        bar.update(2)
    shown = capsys.readouterr().err
    assert "piqa: 100%|" in shown and "2/2" in shown and " of 2 windows" not in shown


def test_steps_of_a_run(tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A line for each step that is logged, as with train.log_every."""
    writer = MetricsWriter(tmp_path, 0, 40)
    writer.progress(19)
    writer.progress(20, "loss 7.100, 100 tokens/s")
    writer.print("step 20: validation perplexity 9")
    writer.close()
    shown = capsys.readouterr()
    assert (
        shown.err == "step 20 of 40: loss 7.100, 100 tokens/s\n" and shown.out == "step 20: validation perplexity 9\n"
    )


def test_a_run_whose_readers_left_is_to_stop(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And to save: `loop` asks the list. Both its streams may be pipes."""
    for name in ("stdout", "stderr"):
        read, write = os.pipe()
        os.close(read)
        monkeypatch.setattr(f"sys.{name}", os.fdopen(write, "w"))
    writer = MetricsWriter(tmp_path, 0, 40)
    with signals.stop_signals() as stopped:
        for step in (20, 40):
            writer.progress(step, "loss 7.100")
            writer.print(f"step {step}: validation perplexity 9")
    assert stopped == [signal.SIGPIPE, signal.SIGPIPE]
    writer.close()
