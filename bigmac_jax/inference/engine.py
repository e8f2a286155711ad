"""Continuous batching: requests enter and leave a running batch at any step.

A step reads parts of prompts, as many as a chunk holds, and then one more token of every slot that decodes. The device
is one step ahead of the host: tokens are looked at after the next step was dispatched, so a request that ends early (at
a stop text) computes one token more, which nobody sees. With speculative decoding a step may be a draft and its
verification, which give a slot one token or more. S batch shards, B slots of one, W rows of prompts, K pages of a
sequence, X numbers of a packed row.

All processes of a job run the same engine with the same requests in the same order, and so take the same steps.
"""

import itertools
from collections import deque
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import numpy as np

from bigmac_jax.config import ConfigError
from bigmac_jax.config.errors import require
from bigmac_jax.inference.decoding import PAGE_SIZE, ROW_PAGES, DecodePrograms, make_state, slots_per_shard
from bigmac_jax.inference.drafts import Drafts
from bigmac_jax.inference.jobs import CANCELLED, Job, Step
from bigmac_jax.inference.kv_cache import Decoder
from bigmac_jax.inference.packed_rows import pack_row, packed_size, read_sampled
from bigmac_jax.inference.pages import Allocation, PageAllocator
from bigmac_jax.model.mesh import batch_ranks, batch_spec, place, tensor_ranks

CHUNK = 512  # tokens of prompts in a step


@dataclass
class _Progress:
    """Where a request with a slot stands: its prompt is read, then it decodes until `asked` is max_tokens."""

    shard: int
    slot: int
    allocation: Allocation
    read: int  # tokens of the prompt that dispatched steps read
    asked: int = 0  # new tokens of dispatched steps; at least, where these are drafts


class _Dispatched(NamedTuple):
    """A program that was dispatched, and what it samples for whom."""

    sampled: jax.Array  # for `packed_rows.read_sampled`
    jobs: list[tuple[Job, int, int]]  # each with its shard and row
    tokens: int = 1  # of a row, at most


def count_pages(positions: int, longest: int, page_size: int = PAGE_SIZE) -> int:
    """Pages of each batch shard's part of a cache of so many positions; raises ConfigError where the longest request
    has no room in it."""
    shards, needed = batch_ranks(), -(-longest // page_size)
    pages = -(-positions // (page_size * shards))
    if pages < needed:
        raise ConfigError(
            f"the cache's {positions} positions are {pages * page_size} on each of {shards} batch shards, which must "
            f"hold the longest request, {longest} tokens; use at least {shards * needed * page_size}"
        )
    return pages


class Engine:
    """Decodes requests in slots, in the order of their arrival, over one paged cache.

    Args:
      decoder, programs: of one model, on the current mesh.
      slots: requests at a time.
      positions: size of the cache in tokens; a request reserves its prompt's and max_tokens, in whole pages.
      longest: tokens of prompt and completion that a request may have.
      chunk: tokens of prompts that a step reads on each batch shard.
      reuse: whether prompts that begin alike share what was computed (prefix caching); never with Mamba layers, nor
        with a next-token module.
      drafts: for speculative decoding.

    Attributes:
      shards, slots: batch shards, and slots of each.
      pages: the page allocator of each shard.
      prefills: number of prefill programs that were run.

    Raises:
      ConfigError: the cache has no room for the longest request.
    """

    def __init__(
        self,
        decoder: Decoder,
        programs: DecodePrograms,
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
        self.shards, self.slots = batch_ranks(), slots_per_shard(slots)
        self.longest, self._row_size = longest, ROW_PAGES * page_size
        self._table_size = -(-longest // page_size)  # K
        pages = count_pages(positions, longest, page_size)
        # A Mamba layer's past is of a whole prompt, and not of its pages; a next-token module has read the token behind
        # a page, too.
        reuse = reuse and not decoder.config.model.mamba_layers and decoder.next_tokens is None
        self.pages = [PageAllocator(pages, page_size, reuse) for _ in range(self.shards)]
        self._state = make_state(decoder, self.slots, pages, page_size)
        self._widths = _prefill_widths(chunk, self._row_size)
        self._queue: deque[Job] = deque()
        self._running: dict[Job, _Progress] = {}  # those with a slot, in the order of arrival
        self._free = [list(range(self.slots))[::-1] for _ in self.pages]
        self._slots_SBX = np.zeros((self.shards, self.slots, packed_size(self._table_size)), np.int32)
        self._slots_on_device: jax.Array | None = None
        self._in_flight: list[_Dispatched] = []
        self.prefills = 0

    @property
    def waiting(self) -> int:
        """Number of requests that have no slot yet."""
        return len(self._queue)

    @property
    def running(self) -> int:
        """Number of requests that have a slot."""
        return len(self._running)

    @property
    def busy(self) -> bool:
        """Whether `step` has anything to do."""
        return bool(self._queue or self._in_flight or self._running)

    def submit(self, job: Job) -> None:
        """Queues a request; raises ConfigError if its prompt is empty, or it is too long."""
        prompt, new = len(job.prompt), job.sampling.max_tokens
        require(prompt > 0, "the prompt has no tokens; give at least one")
        require(
            prompt + new <= self.longest,
            f"the prompt has {prompt} tokens, which with max_tokens={new} are {prompt + new}, and must be at most "
            f"{self.longest}; use a shorter prompt or fewer max_tokens",
        )
        self._queue.append(job)

    def cancel(self, job: Job) -> None:
        """Ends a request now; does nothing if it has ended."""
        if job.text.finish_reason:
            return
        job.text.finish_reason = CANCELLED
        if job in self._running:
            self._release(job)
        else:
            self._queue.remove(job)

    def compile(self) -> None:
        """Runs every program once, with idle rows and slots, so that no request waits for its compilation."""
        with jax.set_mesh(self._mesh):
            for width in self._widths:
                self._prefill(self._idle_rows(width))
            slots = place(np.zeros_like(self._slots_SBX), batch_spec(3))
            self._state, sampled = self._programs.decode(self._programs.weights, self._state, slots)
            if self.drafts:
                self._state, sampled = self.drafts.step(self._programs, self._state, slots)
            jax.block_until_ready(sampled)

    def step(self) -> list[Step]:
        """Dispatches one step and returns the tokens of the step before."""
        before, self._in_flight = self._in_flight, []
        with jax.set_mesh(self._mesh):
            self._admit()
            self._read_prompts()
            self._decode()
        return [step for dispatched in before for step in self._collect(dispatched)]

    def _admit(self) -> None:
        """Gives slots and pages to waiting requests, first come, first served: none overtakes one that waits for
        pages."""
        while self._queue:
            job = self._queue[0]
            shards = [s for s, free in enumerate(self._free) if free]
            # First where most of its prompt is cached, then where most pages are available.
            shards.sort(key=lambda s: (-len(self.pages[s].find_prefix(job.prompt)), -self.pages[s].available))
            for shard in shards:
                if allocation := self.pages[shard].allocate(job.prompt, job.positions):
                    break
            else:
                return
            self._queue.popleft()
            job.reused = allocation.cached
            self._running[job] = _Progress(shard, self._free[shard].pop(), allocation, allocation.cached)

    def _read_prompts(self) -> None:
        """Dispatches the next rows of prompts, each of which begins at a page: prompts in the order of arrival, as many
        rows as the chunk holds."""
        width = self._choose_width()
        if not width:
            return
        rows_SWX, used, ended = self._idle_rows(width), [0] * self.shards, []
        for job, at in self._running.items():
            before = at.read
            while at.read < len(job.prompt) and used[at.shard] < width:
                tokens, position = job.prompt[at.read : at.read + self._row_size], at.read
                at.read += len(tokens)
                following = job.prompt[at.read] if at.read < len(job.prompt) else -1
                packed = self._pack(job, len(tokens), tokens, position, at.slot, following)
                rows_SWX[at.shard, used[at.shard], : len(packed)] = packed
                if following < 0:
                    ended.append((job, at.shard, used[at.shard]))
                used[at.shard] += 1
            if at.read > before:
                self.pages[at.shard].share(at.allocation, job.prompt[: at.read])
        self._in_flight.append(_Dispatched(self._prefill(rows_SWX), ended))
        self.prefills += 1
        for job, _, _ in ended:
            self._count_asked(job, 1)

    def _prefill(self, rows_SWX: np.ndarray) -> jax.Array:
        rows = place(rows_SWX, batch_spec(3))
        self._state, sampled = self._programs.prefill(
            self._programs.weights, self._state, rows, row_size=self._row_size
        )
        return sampled

    def _idle_rows(self, width: int) -> np.ndarray:
        return np.zeros((self.shards, width, packed_size(self._table_size, self._row_size)), np.int32)

    def _choose_width(self) -> int:
        """Rows of the prefill program to run, 0 if no prompt waits: the narrowest program that holds all prompts if
        they fill three quarters of it, else the widest that they fill, and the rest waits for the next step."""
        unread = [0] * self.shards
        for job, at in self._running.items():
            unread[at.shard] += -(-(len(job.prompt) - at.read) // self._row_size)
        most = max(unread)
        if most == 0:
            return 0
        holding = next((width for width in self._widths if width >= most), self._widths[-1])
        filled = [width for width in self._widths if width <= most]
        return holding if 4 * most >= 3 * holding or not filled else filled[-1]

    def _decode(self) -> None:
        running = self._running.items()
        jobs = [(job, at.shard, at.slot) for job, at in running if 0 < at.asked < job.sampling.max_tokens]
        if not jobs:
            return
        if self._slots_on_device is None:
            # A copy: on CPU the device may read the array in place, and later.
            self._slots_on_device = place(self._slots_SBX.copy(), batch_spec(3))
        if self.drafts and self.drafts.should_draft():
            self._state, sampled = self.drafts.step(self._programs, self._state, self._slots_on_device)
            self._in_flight.append(_Dispatched(sampled, jobs, self.drafts.tokens + 1))
        else:
            self._state, sampled = self._programs.decode(self._programs.weights, self._state, self._slots_on_device)
            self._in_flight.append(_Dispatched(sampled, jobs))
        for job, _, _ in jobs:
            self._count_asked(job, self._running[job].asked + 1)

    def _collect(self, dispatched: _Dispatched) -> list[Step]:
        """Waits for a program and adds its tokens to their requests."""
        if not dispatched.jobs:
            return []
        count_SW, sampled = read_sampled(dispatched.sampled)
        steps = []
        for job, shard, row in dispatched.jobs:
            if job.text.finish_reason:
                continue
            wanted, first = job.sampling.logprobs, row * dispatched.tokens
            count = int(count_SW[shard, first])
            if dispatched.tokens > 1:
                assert self.drafts is not None
                self.drafts.count(count - 1, job.sampling.max_tokens - len(job.text.tokens) - 1)
                # The step in flight gives at least one more, or nothing if its slot was idle and all tokens are there.
                self._count_asked(job, len(job.text.tokens) + count + 1)
            for i in range(first, first + count):
                top = (v[shard, i, :wanted].tolist() for v in (sampled.top_tokens, sampled.top_logprobs))
                alternatives = tuple(zip(*top, strict=True)) if wanted else ()
                token, logprob = int(sampled.token[shard, i]), float(sampled.logprob[shard, i])
                piece = job.text.add(token, logprob)
                steps.append(Step(job, piece, token, logprob, alternatives, job.text.finish_reason))
                if job.text.finish_reason:
                    self._release(job)
                    break
        return steps

    def _count_asked(self, job: Job, tokens: int) -> None:
        """Notes that dispatched steps give a request at least so many tokens: its slot decodes from the first one until
        there are max_tokens."""
        at, before = self._running[job], self._running[job].asked
        at.asked = max(before, min(tokens, job.sampling.max_tokens))
        if at.asked == job.sampling.max_tokens:
            self._set_slot(at, 0)
        elif not before:
            self._set_slot(at, self._pack(job, job.positions))

    def _set_slot(self, at: _Progress, packed: np.ndarray | int) -> None:
        self._slots_SBX[at.shard, at.slot] = packed
        self._slots_on_device = None

    def _release(self, job: Job) -> None:
        """Frees slot and pages. A step in flight may still write after the last token: to pages whose next owner writes
        later."""
        at = self._running.pop(job)
        if at.asked < job.sampling.max_tokens:
            self._set_slot(at, 0)
        if at.read == len(job.prompt):  # and so all new tokens but the last
            self.pages[at.shard].share(at.allocation, [*job.prompt, *job.text.tokens[:-1]])
        self.pages[at.shard].free(at.allocation)
        self._free[at.shard].append(at.slot)

    def _pack(self, job: Job, count: int, *row: Any) -> np.ndarray:
        pages = self._running[job].allocation.pages
        return pack_row(job.sampling, job.number, count, [*pages, *[0] * (self._table_size - len(pages))], *row)


def _prefill_widths(chunk: int, row_size: int) -> tuple[int, ...]:
    """Rows of the prefill programs: from one for a short prompt to the whole chunk, each four times the last."""
    multiple = tensor_ranks()
    most = max(1, -(-chunk // row_size))
    widths = [*itertools.takewhile(lambda width: width < most, (4**i for i in itertools.count())), most]
    return tuple(dict.fromkeys(-(-width // multiple) * multiple for width in widths))
