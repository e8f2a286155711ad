"""The cost model of a training step: what a job asks of each rank, and one function per term that says its seconds.

A `Job` is of a config of ours (`planning.cost`) or of a published run (`planning.published`), and the terms are the
same: docs/planning-truth.md holds them against what others have measured. R row width, F expert hidden.
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field

from bigmac_jax.planning.hardware import Hardware
from bigmac_jax.planning.shapes import Shape

# An optimizer reads a parameter and its gradient and writes the parameter, and clipping reads the gradient once more;
# AdamW reads and writes two moments beside.
UPDATE_BYTES = 4 * (2 + 1 + 1)
OPTIMIZER_BYTES = UPDATE_BYTES + 4 * 2 * 2
# A part of the batch adds its gradients to those before it: reads and writes a sum.
ACCUMULATION_BYTES = 4 * 2
# Logits in 16 bits: written, read for their maximum and sum, and read and overwritten by their gradient.
LOSS_BYTES = 2 * (1 + 2 + 2)
# A product's input is read for its largest entry, read again, and written in 8 bits along rows and along columns; so is
# its output's gradient.
QUANTIZED_BYTES = 2 + 2 + 1 + 1
# What a backward pass takes beside a forward pass: products twice; of attention's two products five, as scores are
# computed again (FlashAttention-2, arXiv 2307.08691, 3.1); passes over memory twice, as they read what they change.
BACKWARD, SCORES_BACKWARD = 2.0, 2.5
# Numbers by which a product's sides count as longer: what it takes to fill a matrix unit, and the last tile's rest. The
# units of TPU v6e are 256 wide, tiles of GPU kernels 128 to 256.
NARROW = 256
# Passes of bfloat16 that a product of our router takes, whose result is float32's: of three pieces on GPUs
# (`model.layers.exact_product`); on TPU three forward and for the rows' gradient, six for the matrix' (v5p, v6e, by the
# compiler's estimates). Of float32 rows six on TPU, and on GPUs no tensor core: an H100 is 7.4 times as slow.
EXACT_PASSES = {"gpu": 3.0, "tpu": 4.0}
EXACT_PASSES_OF_FLOAT32 = {"gpu": 7.4, "tpu": 6.0}
# Rows of a tile of a grouped product, of which the last of each expert is half empty.
ROW_TILES = {"gpu": 128, "tpu": 256}
# How often an entry of an expert's row is read or written on its way to the expert and back, forward. With fused
# kernels it is gathered (2) and summed (1), and around an exchange sorted on both sides (4). On TPU, of other programs,
# some forty passes stand for all that XLA leaves around a kernel: they take 0.65 of 0.99 s of local work of MaxText
# 0.2.5's compiled step of Qwen3-30B on v6e:4x8, by the compiler's estimates.
ROW_PASSES, EXCHANGED_ROW_PASSES, TPU_ROW_PASSES = 3.0, 7.0, 38.0
# Of our own steps there, by the same estimates (docs/planning-truth.md): rows without an exchange and with one; and how
# many times as long as they must the other passes take, of which heads' norms and rotary positions have most.
OUR_TPU_ROW_PASSES, OUR_TPU_EXCHANGED_ROW_PASSES, OUR_TPU_PASSES = 6.0, 9.0, 4.4
# The share of the peak that the scan of Mamba-2 reaches; assumed: a Triton kernel of small products.
SCAN_EFFICIENCY = 0.15
# What is hidden of the sums that could be. On GPUs they take a part of the processors from what runs beside them: 20 of
# 132 in DeepSeek-V3's training (arXiv 2412.19437, 3.2.2).
HIDDEN_SUMS = {"gpu": 0.85, "tpu": 1.0}
# Not the router, nor logits; nor, as in Nemotron 3, latent projections and Mamba layers.
EIGHT_BIT_PARTS = ("attention", "mlp", "experts", "shared")


@dataclass(frozen=True)
class Job:
    """A training step as its time depends on it.

    Attributes:
      tokens: of the step, of which `parts` parts follow each other.
      tensor, stages, experts_over: ranks that split a layer's matrices, the layers, one set of experts.
      virtual: stages of a rank.
      chunks: parts of a rank's tokens whose experts are computed one after another.
      split_experts: experts' matrices, too, are split over `tensor`.
      ours: the program is this project's, whose passes over memory were read from compiled steps.
      grouped: experts' rows are moved to where the experts read them, not multiplied by a table of ones and zeros.
      eight_bit: products are in 8 bits where that is usual.
      causal: attention leaves out what the mask hides.
      forward_passes, to_logits: forward passes, and those of them whose logits are computed.
      again: the share of each part's forward pass that is recomputed; also of "scores" and of "passes" over memory.
      frozen: parts whose matrices get no gradient.
      useful: FLOPs of a step, and those with half of attention's scores and values; by default of the shape.
      padding: rows that experts multiply over rows that hold a token.
      imbalance: the busiest expert rank's rows over the mean.
      updated: parameters of a rank that the optimizer reads.
      optimizer_bytes: that it reads and writes for each of them.
      orthogonal: FLOPs of a rank that make Muon's updates orthogonal.
      accumulated: numbers of a rank's gradients while parts are added.
      exchange, tensor_sent, gathers, gradients, replicas: seconds on the wire with nothing beside.
      hidden_exchange: the share of the exchange, or of experts if they are shorter, that runs beside experts.
      moments, entered: bytes of the optimizer's moments and of what enters layers that a rank copies to host memory and
        back in a step.
      hides_sums: whether gathers and sums of gradients run beside computation.
    """

    shape: Shape
    length: int
    tokens: int
    ranks: int
    dtype: str = "bfloat16"
    parts: int = 1
    tensor: int = 1
    stages: int = 1
    virtual: int = 1
    experts_over: int = 1
    chunks: int = 1
    split_experts: bool = False
    eight_bit: bool = False
    ours: bool = False
    grouped: bool = True
    causal: bool = True
    forward_passes: float = 1.0
    to_logits: float = 1.0
    again: Mapping[str, float] = field(default_factory=dict)
    frozen: Collection[str] = ()
    useful: tuple[float, ...] = ()
    padding: float = 1.0
    imbalance: float = 1.0
    updated: float = 0.0
    optimizer_bytes: float = OPTIMIZER_BYTES
    orthogonal: float = 0.0
    accumulated: float = 0.0
    exchange: float = 0.0
    tensor_sent: float = 0.0
    gathers: float = 0.0
    gradients: float = 0.0
    replicas: float = 0.0
    hidden_exchange: float = 0.0
    moments: float = 0.0
    entered: float = 0.0
    hides_sums: bool = False

    @property
    def number(self) -> int:
        """Bytes of a number that is computed with."""
        return 4 if self.dtype == "float32" else 2

    @property
    def of_a_rank(self) -> float:
        """A rank's share of the tokens, with all layers."""
        return self.tokens / self.ranks

    @property
    def at_a_time(self) -> float:
        """Tokens that pass a layer of `tensor` ranks at a time."""
        return self.tokens * self.tensor * self.stages / self.ranks / self.parts


@dataclass(frozen=True)
class Times:
    """Seconds of a training step by term, one after the other except for what is hidden."""

    matmul: float  # products with parameters, with recomputation and the padding of experts' rows
    exchange: float  # experts' rows and their metadata on the wire, as if nothing ran beside them
    gradients: float  # summed over the ranks that share parameters
    optimizer: float  # its passes over memory, and those that add up the gradients of a batch in parts
    hidden: float  # the part of `exchange` that runs beside matmuls, at best
    tokens: int  # tokens of a step
    at_peak: float  # seconds of the step's useful FLOPs (`Job.useful`) at the machine's peak
    tensor: float = 0.0  # sequences gathered, and sums of them scattered, over mesh.tensor
    parameters: float = 0.0  # parameters gathered from their shards, with mesh.fsdp
    attention: float = 0.0  # scores and values; the scan of Mamba layers
    memory: float = 0.0  # elementwise passes: norms, residuals, activations, rows to experts and back, the loss
    bubble: float = 0.0  # stages that wait for the first and the last part
    replicas: float = 0.0  # gradients summed over replicas when all are known: nothing runs beside
    hidden_sums: float = 0.0  # the part of `parameters` and `gradients` that runs beside computation
    host: float = 0.0  # copies to host memory and back that nothing hides
    at_peak_causal: float = 0.0  # as at_peak, with half of attention's scores and values

    @property
    def computing(self) -> float:
        """Seconds in which a rank computes a model's layers."""
        return self.matmul + self.attention + self.memory

    @property
    def total(self) -> float:
        """Seconds of the whole step."""
        sums = self.parameters + self.gradients - self.hidden_sums
        sent = self.exchange - self.hidden + self.tensor + sums + self.replicas
        return self.computing + self.bubble + sent + self.optimizer + self.host

    @property
    def exchange_share(self) -> float:
        """Share of the step that waits for the exchange."""
        return (self.exchange - self.hidden) / self.total

    @property
    def tokens_per_s(self) -> float:
        """Tokens a second of all ranks together."""
        return self.tokens / self.total

    @property
    def mfu(self) -> float:
        """Model FLOPs utilisation: the share of the machine's peak that useful FLOPs reach."""
        return self.at_peak / self.total

    @property
    def mfu_causal(self) -> float:
        """As `mfu`, with half of attention's scores and values, as Megatron and MaxText count."""
        return self.at_peak_causal / self.total

    def as_dict(self) -> dict[str, float]:
        """All terms and what follows from them, for plan.py's JSON."""
        names = (*TERMS, "total", "exchange_share", "tokens_per_s", "mfu", "mfu_causal")
        return {name: getattr(self, name) for name in names}


TERMS = {
    "matmul": "products with parameters",
    "attention": "scores and values",
    "memory": "elementwise passes over memory",
    "exchange": "experts' rows on the wire",
    "hidden": "… of it beside experts",
    "tensor": "sequences over mesh.tensor",
    "parameters": "parameters gathered",
    "gradients": "gradients summed",
    "hidden_sums": "… of both beside computation",
    "replicas": "gradients' shards summed over replicas",
    "optimizer": "the optimizer's passes over memory",
    "host": "copies to host memory and back",
    "bubble": "stages that wait",
}
HIDDEN = ("hidden", "hidden_sums")  # terms that others are shorter by


def exposed(time: Mapping[str, float]) -> dict[str, float]:
    """Seconds of `Times.as_dict` by term, without what is hidden: they add up to the step."""
    terms = {term: time.get(term, 0.0) for term in TERMS if term not in HIDDEN}
    terms["exchange"] -= time.get("hidden", 0.0)
    sums = terms["parameters"] + terms["gradients"]
    for term in ("parameters", "gradients"):
        terms[term] -= terms[term] / sums * time.get("hidden_sums", 0.0) if sums else 0.0
    return terms


def predict(job: Job, hardware: Hardware) -> Times:
    """The seconds of a job's step on a machine."""
    products = product_seconds(job, hardware)
    attention, memory = attention_seconds(job, hardware), memory_seconds(job, hardware)
    computing = sum(products.values()) + attention + memory
    hidden_sums = HIDDEN_SUMS[hardware.platform] * min(job.gathers + job.gradients, computing)
    peak = job.ranks * hardware.flops_per_second(job.dtype)
    useful = job.useful or [3 * job.tokens * job.shape.flops(job.length, causal) for causal in (False, True)]
    at_peak, at_peak_causal = (flops / peak for flops in useful)
    return Times(
        matmul=sum(products.values()),
        attention=attention,
        memory=memory,
        exchange=job.exchange,
        hidden=job.hidden_exchange * min(job.exchange, products.get("experts", 0.0)),
        tensor=job.tensor_sent,
        parameters=job.gathers,
        gradients=job.gradients,
        replicas=job.replicas,
        hidden_sums=hidden_sums if job.hides_sums else 0.0,
        optimizer=optimizer_seconds(job, hardware),
        host=host_seconds(job, hardware, computing),
        bubble=computing * (job.stages - 1) / (job.virtual * job.parts),
        tokens=job.tokens,
        at_peak=at_peak,
        at_peak_causal=at_peak_causal,
    )


def passes_of(
    part: str, forward: float, to_logits: float, again: Mapping[str, float], frozen: Collection[str] = ()
) -> float:
    """Times that a step goes through a part's products.

    Args:
      forward, to_logits, again, frozen: as `Job.forward_passes`, `Job.to_logits`, `Job.again` and `Job.frozen`.
    """
    return (to_logits if part == "output" else forward) + again.get(part, 0.0) + BACKWARD - (part in frozen)


def product_seconds(job: Job, hardware: Hardware) -> dict[str, float]:
    """Seconds of a rank's matrix products in a step, by part of the model: of each the longer of its FLOPs, at the
    share of the peak that a large product reaches, and its bytes over the memory's bandwidth."""
    seconds: dict[str, float] = {}
    for product in job.shape.products():
        part = product.part
        passes = passes_of(part, job.forward_passes, job.to_logits, job.again, job.frozen)
        eight_bit = job.eight_bit and part in EIGHT_BIT_PARTS
        rate, number = hardware.peak(job.dtype, eight_bit) * hardware.matmul_efficiency, 1 if eight_bit else job.number
        if part == "router" and job.ours:
            exact = EXACT_PASSES_OF_FLOAT32 if job.dtype == "float32" else EXACT_PASSES
            rate, number = rate / exact[hardware.platform], 4
        if part == "experts":
            matrices = product.matrices / job.experts_over
            split = job.tensor if job.split_experts else 1
            rows = job.at_a_time / (1 if job.split_experts else job.tensor) / job.chunks
            rows *= job.experts_over * product.times / product.matrices * job.padding * job.imbalance
            computed, calls = rows + ROW_TILES.get(hardware.platform, 0) / 2, job.parts * job.chunks
        else:
            matrices, split, calls = product.times, job.tensor, job.parts
            rows = computed = job.at_a_time
        flops = 2 * computed * (product.X + NARROW) * (product.Y / split + NARROW)
        read = rows * (product.X + product.Y) * (1 + 1 / split) / 2 + product.X * product.Y / split
        one = max(flops / rate, number * read / hardware.memory_bandwidth)
        seconds[part] = seconds.get(part, 0.0) + one * passes * calls * matrices / job.stages
    return seconds


def attention_seconds(job: Job, hardware: Hardware) -> float:
    """Seconds of attention's scores and values, and of the scan of Mamba layers, which are computed in 16 bits."""
    passes = job.forward_passes + job.again.get("scores", 0.0)
    flops = job.shape.score_flops(job.length, job.causal) * (passes + SCORES_BACKWARD)
    flops += job.shape.scan_flops() * (passes + BACKWARD) * hardware.attention_efficiency / SCAN_EFFICIENCY
    return job.of_a_rank * flops / (hardware.flops_per_second(job.dtype) * hardware.attention_efficiency)


def memory_seconds(job: Job, hardware: Hardware) -> float:
    """Seconds of the passes over memory that compute little: what stands between products, and the loss."""
    passes = job.forward_passes + job.again.get("passes", 0.0) + BACKWARD
    others = job.shape.passed_numbers(0.0)
    rows = job.shape.passed_numbers(row_passes(job, hardware)) - others
    longer = OUR_TPU_PASSES if job.ours and hardware.platform == "tpu" else 1.0
    size = job.number * (rows + longer * others) * passes
    size += LOSS_BYTES / 2 * job.number * job.shape.vocab * (1 + job.shape.mtp)
    if job.eight_bit:
        size += sum(
            QUANTIZED_BYTES * (product.X * (1 + job.again.get(product.part, 0.0)) + product.Y) * product.times
            for product in job.shape.products()
            if product.part in EIGHT_BIT_PARTS
        )
    return job.of_a_rank * size / hardware.memory_bandwidth


def row_passes(job: Job, hardware: Hardware) -> float:
    """How often an entry of an expert's row is read or written, forward."""
    if job.ours and hardware.platform == "tpu":
        return OUR_TPU_EXCHANGED_ROW_PASSES if job.experts_over > 1 else OUR_TPU_ROW_PASSES
    if job.grouped and hardware.platform == "tpu":
        return TPU_ROW_PASSES
    return EXCHANGED_ROW_PASSES if job.experts_over > 1 else ROW_PASSES


def optimizer_seconds(job: Job, hardware: Hardware) -> float:
    """Seconds of the optimizer's passes over memory and of Muon's products, which are of float32, and of adding up
    gradients where the batch goes in parts."""
    added = job.accumulated * ACCUMULATION_BYTES * job.parts if job.parts > 1 else 0.0
    products = job.orthogonal / (hardware.peak_flops_float32 * hardware.matmul_efficiency)
    return products + (job.updated * job.optimizer_bytes + added) / hardware.memory_bandwidth


def host_seconds(job: Job, hardware: Hardware, computing: float) -> float:
    """Seconds of copies to host memory and back, but for what runs beside the layers' computation.

    What enters a layer goes there in the forward pass and comes back in the backward pass, beside the layers around it.
    Moments come and go when gradients are known, and little is computed then. All take bandwidth of device memory.
    """
    if not (job.moments or job.entered):
        return 0.0
    assert hardware.host_bandwidth, hardware.device_kind
    forward = job.forward_passes / (job.forward_passes + job.again.get("passes", 0.0) + BACKWARD)
    one_way = job.entered / hardware.host_bandwidth
    waits = max(0.0, one_way - forward * computing) + max(0.0, one_way - (1 - forward) * computing)
    passes = 2 * (job.moments + job.entered) / hardware.memory_bandwidth
    return 2 * job.moments / hardware.host_bandwidth + waits + passes
