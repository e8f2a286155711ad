"""Continuous batching: requests enter and leave a running batch at any step.

A step reads parts of prompts, as many as a chunk holds, and then one more token of every slot that decodes. The device
is one step ahead of the host: what a step chose is looked at after the next one was dispatched, so a request that ends
at a token of its own computes one more, which nobody sees. With speculation a step may be a draft and its verification,
which give a slot one token or more. S shards of the batch, B slots of one, K pages of a sequence.

All processes of a job run the same engine with the same requests in the same order, and so take the same steps.
"""

from collections import deque
from typing import NamedTuple

import jax
import numpy as np

from bigmac_jax.config import Config, ConfigError
from bigmac_jax.inference.decoding import (
    IDLE,
    PAGE_SIZE,
    ROW_PAGES,
    Decoding,
    Packed,
    make_state,
    pack,
    packed_size,
    read,
    slots_of,
)
from bigmac_jax.inference.drafts import Drafts
from bigmac_jax.inference.jobs import CANCELLED, Job, Step
from bigmac_jax.inference.kv_cache import Decoder
from bigmac_jax.inference.pages import Pages
from bigmac_jax.inference.sampling import draws_of
from bigmac_jax.model.mesh import batch_ranks, batch_spec, place, tensor_ranks

CHUNK = 512  # tokens


class _Dispatched(NamedTuple):
    """What a program chooses, and for whom."""

    chosen: jax.Array  # for `programs.read`
    jobs: list[tuple[Job, int, int]]  # each with its shard and row
    tokens: int = 1  # of a row, at most


class Engine:
    """Slots that requests enter in the order of their arrival, over pages of one cache.

    Args:
      decoder, programs: of one model, on the current mesh.
      slots: requests at a time.
      positions: that the cache has room for; a request takes its prompt's and max_tokens, in whole pages.
      longest: of a request, prompt and completion.
      chunk: tokens of prompts that a step reads on each shard of the batch.
      reuse: whether prompts that begin alike share what was computed.
      drafts: how tokens are drafted; None: they are not.

    Raises:
      ConfigError: no request of the longest would have room.
    """

    def __init__(
        self,
        config: Config,
        decoder: Decoder,
        programs: Decoding,
        slots: int,
        positions: int,
        longest: int,
        chunk: int = CHUNK,
        page_size: int = PAGE_SIZE,
        reuse: bool = True,
        drafts: Drafts | None = None,
    ):
        self.drafts = drafts
        self._programs, self._mesh = programs, jax.sharding.get_mesh()
        self.shards, self.slots = batch_ranks(), slots_of(slots)
        self.longest, self._row = longest, ROW_PAGES * page_size
        self._table = -(-longest // page_size)  # K
        pages = -(-positions // (page_size * self.shards))
        if pages < self._table:
            raise ConfigError(
                f"the cache's {positions} positions are {pages * page_size} on each of {self.shards} batch shards, "
                f"which must hold the longest request, {longest} tokens; use at least "
                f"{self.shards * self._table * page_size}"
            )
        self.pages = [Pages(pages, page_size, reuse) for _ in range(self.shards)]
        self._state = make_state(config, decoder, self.slots, pages, page_size)
        self._widths = _widths(chunk, self._row)
        self._queue: deque[Job] = deque()
        self._reading: list[list[Job]] = [[] for _ in self.pages]  # their prompts; in the order of arrival
        self._decoding: dict[Job, None] = {}
        self._free = [list(range(self.slots))[::-1] for _ in self.pages]
        self._packed_SBX = np.zeros((self.shards, self.slots, packed_size(self._table)), np.int32)
        self._on_device: jax.Array | None = None
        self._in_flight: list[_Dispatched] = []
        self.prefills = self.decodes = 0  # programs that were run

    @property
    def waiting(self) -> int:
        """Requests that have no slot yet."""
        return len(self._queue)

    @property
    def running(self) -> int:
        """Requests that have a slot."""
        return self.shards * self.slots - sum(map(len, self._free))

    @property
    def busy(self) -> bool:
        return bool(self._queue or self._in_flight or self.running)

    def check(self, prompt_tokens: int, max_tokens: int) -> None:
        """Raises ConfigError for a request that is too long."""
        if prompt_tokens + max_tokens > self.longest:
            raise ConfigError(
                f"the prompt has {prompt_tokens} tokens, which with max_tokens={max_tokens} are "
                f"{prompt_tokens + max_tokens}, and must be at most {self.longest}; use a shorter prompt or fewer "
                f"max_tokens"
            )

    def submit(self, job: Job) -> None:
        self.check(len(job.prompt), job.sampling.max_tokens)
        self._queue.append(job)

    def cancel(self, job: Job) -> None:
        """Ends a request now; nothing happens if it has ended."""
        if job.text.finish_reason:
            return
        job.text.finish_reason = CANCELLED
        if job._lease is None:
            self._queue.remove(job)
        else:
            self._leave(job)

    def compile(self) -> None:
        """Runs every program once, of nothing: so that no request waits for its compilation."""
        with jax.set_mesh(self._mesh):
            for width in self._widths:
                packed = place(self._no_rows(width), batch_spec(3))
                self._state, _ = self._programs.prefill(self._programs.weights, self._state, packed, row_size=self._row)
            slots = place(np.zeros_like(self._packed_SBX), batch_spec(3))
            self._state, chosen = self._programs.decode(self._programs.weights, self._state, slots)
            if self.drafts:
                self._state, chosen = self.drafts.step(self._programs, self._state, slots)
            jax.block_until_ready(chosen)

    def step(self) -> list[Step]:
        """Dispatches one step, and gives the tokens of the step before."""
        before, self._in_flight = self._in_flight, []
        with jax.set_mesh(self._mesh):
            self._admit()
            self._read_prompts()
            self._decode()
        return [step for dispatched in before for step in self._looked_at(dispatched)]

    def _admit(self) -> None:
        """First come, first served: nobody goes before one who waits for pages."""
        while self._queue:
            job = self._queue[0]
            shards = [s for s, free in enumerate(self._free) if free]
            # Where most of its prompt is, and then where there is most room.
            shards.sort(key=lambda s: (-len(self.pages[s].matching(job.prompt)), -self.pages[s].available))
            for shard in shards:
                if lease := self.pages[shard].begin(job.prompt, job.positions):
                    break
            else:
                return
            self._queue.popleft()
            job._shard, job._slot, job._lease = shard, self._free[shard].pop(), lease
            job._read = job.reused = lease.ready
            self._reading[shard].append(job)

    def _read_prompts(self) -> None:
        """The next rows of prompts, which begin at a page: prompts in the order of arrival, each as far as the chunk
        goes."""
        width = self._width()
        if not width:
            return
        rows = [self._rows(shard, width) for shard in range(self.shards)]
        packed_SWX = self._no_rows(width)
        ended = []
        for shard, of_shard in enumerate(rows):
            for row, (job, position) in enumerate(of_shard):
                assert job._lease is not None
                tokens = job.prompt[position : position + self._row]
                ends = position + len(tokens) == len(job.prompt)
                head = Packed(draws_of(job.sampling, job.number), len(tokens), position, job._slot if ends else -1)
                padding = [0] * (self._row - len(tokens))
                packed_SWX[shard, row] = pack(head, self._padded(job), [*tokens, *padding])
                if ends:
                    ended.append((job, shard, row))
        packed = place(packed_SWX, batch_spec(3))
        self._state, chosen = self._programs.prefill(self._programs.weights, self._state, packed, row_size=self._row)
        self.prefills += 1
        self._in_flight.append(_Dispatched(chosen, ended))
        for shard, of_shard in enumerate(rows):
            for job in dict.fromkeys(job for job, _ in of_shard):
                assert job._lease is not None
                self.pages[shard].filled(job._lease, job.prompt[: job._read])
        for job, shard, _ in ended:
            self._reading[shard].remove(job)
            job._asked = 1
            if job.sampling.max_tokens > 1:
                self._decoding[job] = None
                self._tell(job)

    def _no_rows(self, width: int) -> np.ndarray:
        """So many idle rows for every shard, packed."""
        idle = pack(IDLE, [0] * self._table, [0] * self._row)
        return np.tile(np.asarray(idle, np.int32), (self.shards, width, 1))

    def _width(self) -> int:
        """Of the program that reads what there is: the one that holds it, if that is filled to three quarters, else one
        that is filled whole, and the rest goes in the next step. 0: there is nothing."""

        def rows(job: Job) -> int:
            return -(-(len(job.prompt) - job._read) // self._row)

        most = max(sum(map(rows, jobs)) for jobs in self._reading)
        if most == 0:
            return 0
        holding = next((width for width in self._widths if width >= most), self._widths[-1])
        smaller = [width for width in self._widths if width <= most]
        return holding if 4 * most >= 3 * holding or not smaller else smaller[-1]

    def _rows(self, shard: int, width: int) -> list[tuple[Job, int]]:
        """Jobs and positions of the first tokens of this step's rows."""
        rows: list[tuple[Job, int]] = []
        for job in self._reading[shard]:
            while job._read < len(job.prompt) and len(rows) < width:
                rows.append((job, job._read))
                job._read = min(job._read + self._row, len(job.prompt))
        return rows

    def _decode(self) -> None:
        if not self._decoding:
            return
        if self._on_device is None:
            # A copy: on CPU the device may read it where it stands, and later.
            self._on_device = place(self._packed_SBX.copy(), batch_spec(3))
        jobs = [(job, job._shard, job._slot) for job in self._decoding]
        if self.drafts and self.drafts.due():
            self._state, chosen = self.drafts.step(self._programs, self._state, self._on_device)
            self._in_flight.append(_Dispatched(chosen, jobs, self.drafts.tokens + 1))
        else:
            self._state, chosen = self._programs.decode(self._programs.weights, self._state, self._on_device)
            self._in_flight.append(_Dispatched(chosen, jobs))
        self.decodes += 1
        for job in list(self._decoding):
            job._asked += 1
            if job._asked == job.sampling.max_tokens:
                self._rest(job)

    def _looked_at(self, dispatched: _Dispatched) -> list[Step]:
        if not dispatched.jobs:
            return []
        count_SW, chosen = read(dispatched.chosen)
        steps = []
        for job, shard, row in dispatched.jobs:
            if job.text.finish_reason:
                continue
            asked, first = job.sampling.logprobs, row * dispatched.tokens
            count = int(count_SW[shard, first])
            if dispatched.tokens > 1:
                assert self.drafts is not None
                self.drafts.count(count - 1, job.sampling.max_tokens - len(job.text.tokens) - 1)
                # Of the step that is under way one more is sure, or the slot is idle and this is too much: it ends now.
                self._sure(job, len(job.text.tokens) + count + 1)
            for i in range(first, first + count):
                likely = zip(*(v[shard, i, :asked].tolist() for v in chosen[2:]), strict=True) if asked else ()
                found = int(chosen.token[shard, i]), float(chosen.logprob[shard, i])
                piece = job.text.add(*found)
                steps.append(Step(job, piece, *found, tuple(likely), job.text.finish_reason))
                if job.text.finish_reason:
                    self._leave(job)
                    break
        return steps

    def _sure(self, job: Job, tokens: int) -> None:
        """That it has so many, or all."""
        job._asked = max(job._asked, min(tokens, job.sampling.max_tokens))
        if job._asked == job.sampling.max_tokens and job in self._decoding:
            self._rest(job)

    def _leave(self, job: Job) -> None:
        """Gives slot and pages back. A step in flight may still write behind its last token: to pages that whoever gets
        them next writes later."""
        assert job._lease is not None
        if job in self._decoding:
            self._rest(job)
        if job in self._reading[job._shard]:
            self._reading[job._shard].remove(job)
        else:  # the last token was not read
            self.pages[job._shard].filled(job._lease, [*job.prompt, *job.text.tokens[:-1]])
        self.pages[job._shard].end(job._lease)
        self._free[job._shard].append(job._slot)

    def _tell(self, job: Job) -> None:
        """That its slot decodes from now on."""
        head = Packed(draws_of(job.sampling, job.number), job.positions)
        self._packed_SBX[job._shard, job._slot] = pack(head, self._padded(job))
        self._on_device = None

    def _rest(self, job: Job) -> None:
        """Its slot decodes no more."""
        del self._decoding[job]
        self._packed_SBX[job._shard, job._slot] = 0
        self._on_device = None

    def _padded(self, job: Job) -> list[int]:
        """Its row of the page table."""
        assert job._lease is not None
        return [*job._lease.pages, *[0] * (self._table - len(job._lease.pages))]


def _widths(chunk: int, row: int) -> tuple[int, ...]:
    """Rows of the prefill programs, from one for a short prompt to the chunk, each four times as wide as the last."""
    unit = tensor_ranks()
    most = max(1, -(-chunk // row))
    widths: list[int] = []
    while not widths or widths[-1] < most:
        widths.append(min(most, 4 ** len(widths)))
    return tuple(dict.fromkeys(-(-width // unit) * unit for width in widths))
