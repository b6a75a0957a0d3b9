"""How much memory a model takes at most while it is sampled, scored or trained, by formula.

Everything here is bytes of tensors on the device that computes. What a process has beside them
(Python and its libraries; on a GPU CUDA's context and what its allocator cannot join up) comes on
top. tests/test_footprint.py holds the formulas to what autograd keeps and to what trainings take.
"""

from __future__ import annotations

import math
from dataclasses import astuple, dataclass
from typing import Literal

from kernels.grouped_hidden import WORTH
from kernels.head import MAX_BYTES, MAX_BYTES_ELSEWHERE
from roles.policy.decoding import cache_beside
from roles.policy.reading import READ_AT_ONCE
from roles.policy.scoring import TOKENS, TOKENS_ON_CPU
from roles.policy.shape import Shape
from roles.trainers.options import Options

FULL = 4
"""Bytes of a weight that is trained, of its gradient and of each of Adam's two moments."""
FOUR_BITS = 0.5 + 1 / 64 + 4 / (64 * 256)
"""Bytes of a weight: half a byte, a byte of scale for each 64, and a float32 for each 256 of these.
"""
VLLM_READS, VLLM_CPU_CACHE_GIB = 8192, 4
"""Tokens that vLLM reads at once, and its keys and values on a CPU, unless it is told otherwise."""
DRAWING = 16
"""Bytes beside each logit while a token is drawn of it on a GPU: as float32, its exponential, and
the sums in float64. A CPU draws a part at a time."""


@dataclass(frozen=True)
class Device:
    """What computes. bytes: of its memory, None where that is not known."""

    kind: Literal["cpu", "cuda", "mps"]
    bytes: int | None = None
    bfloat16: bool = False
    """Whether trainings pass in bfloat16 where nobody says otherwise."""


@dataclass(frozen=True)
class Footprint:
    """Bytes at most, each by itself, and of all at once: not all are at their most together."""

    weights: int = 0
    """Of them what products need in another dtype as well."""
    cache: int = 0
    """Keys and values."""
    optimizer: int = 0
    gradients: int = 0
    activations: int = 0
    """With logits, and whatever else goes when a pass ends."""
    peak: int = 0


@dataclass(frozen=True)
class Lengths:
    """Tokens of a prompt and of an answer, the longest that there are."""

    prompt: int
    answer: int

    @property
    def both(self) -> int:
        return self.prompt + self.answer


def sampling(
    shape: Shape,
    weight_bytes: int,
    device: Device,
    lengths: Lengths,
    *,
    prompts: int,
    answers: int,
    batch_size: int,
    cache_gib: float | None,
    adapter: int = 0,
) -> Footprint:
    """Of `answers` to each of `prompts`, as roles.policy.decoding makes them: in batches of whole
    prompts, within batch_size rows and the bound on keys and values.

    adapter: weights of one in float32 over the model.
    """
    weights = weight_bytes * shape.parameters + FULL * adapter
    at_once = min(prompts, max(1, batch_size // answers))
    rows = min(at_once * answers, batch_size)
    token = weight_bytes * shape.cached
    if cache_gib is not None:
        bound = int(cache_gib * 2**30)
    else:
        bound = cache_beside(device.bytes if device.kind == "cuda" else None, weights)
    wanted = (at_once * lengths.prompt + rows * lengths.answer) * token
    cache = max(min(wanted, bound), lengths.both * token)
    if wanted > cache:  # fewer go at once then
        at_once, rows = (max(1, math.ceil(each * cache / wanted)) for each in (at_once, rows))
    reading = min(READ_AT_ONCE, at_once * lengths.prompt)
    logits = rows * shape.vocabulary * (weight_bytes + DRAWING * (device.kind == "cuda"))
    passing = _passing(shape, reading, weight_bytes) + reading * token
    activations = max(passing, logits)
    return Footprint(
        weights=weights,
        cache=cache,
        activations=activations,
        peak=weights + cache + activations,
    )


def by_vllm(
    shape: Shape,
    weight_bytes: int,
    device: Device,
    lengths: Lengths,
    *,
    share: float,
    cache_gib: float | None,
    split: int = 1,
    adapter: int = 0,
) -> Footprint:
    """Of one GPU, or of the CPU, while vLLM samples or scores. Its cache is as large as it is told
    to be, or what is left of its share of the GPU, and holds a longest text in any case.

    split: GPUs that the model is spread over. adapter: weights of one over the model.
    """
    weights = weight_bytes * (shape.parameters + adapter) // split
    token = weight_bytes * shape.cached // split
    activations = _passing(shape, VLLM_READS, weight_bytes) // split
    cache = lengths.both * token
    if cache_gib is not None or device.kind != "cuda":
        cache = max(cache, int((VLLM_CPU_CACHE_GIB if cache_gib is None else cache_gib) * 2**30))
    elif device.bytes is not None:
        cache = max(cache, int(share * device.bytes) - weights - activations)
    return Footprint(
        weights=weights,
        cache=cache,
        activations=activations,
        peak=weights + cache + activations,
    )


def scoring(
    shape: Shape,
    weight_bytes: int,
    device: Device,
    *,
    tokens: int | None = None,
    cast: bool = False,
) -> Footprint:
    """Of log-probabilities of answers, or of a reward model's scores.

    tokens: that pass at once; None is what suits the device. cast: whether products are in
    bfloat16 and the weights in float32.
    """
    if tokens is None:
        tokens = TOKENS_ON_CPU if device.kind == "cpu" else TOKENS
    weights = weight_bytes * shape.parameters + (2 * shape.multiplied if cast else 0)
    narrow = 2 if cast else weight_bytes
    cache = tokens * narrow * shape.cached
    passing = _passing(shape, tokens, narrow)
    most = MAX_BYTES if device.kind == "cpu" else MAX_BYTES_ELSEWHERE
    tile = min(most, tokens * shape.vocabulary * narrow) + 2 * FULL * tokens * shape.hidden
    return Footprint(
        weights=weights,
        cache=cache,
        activations=max(passing, tile),
        peak=weights + max(cache + passing, tile),  # keys are gone when logits come
    )


def training(
    shape: Shape,
    options: Options,
    device: Device,
    lengths: Lengths,
    *,
    sides: int,
    scores: bool,
) -> Footprint:
    """Of the steps, and of the reference's scores before the first.

    sides: answers of an example, 2 of a pair. scores: whether a reference scores the examples.
    A batch in one micro-batch makes its gradients while activations go, layer by layer; one in
    several holds the gradients of those before. Moments are there from the second step on.
    """
    auto = options.dtype == "auto" and device.kind == "cuda" and device.bfloat16
    narrow = 2 if options.dtype == "bfloat16" or auto else FULL
    low_rank = options.lora_rank is not None
    adapter = shape.adapter(options.lora_rank or 0, options.lora_targets) if low_rank else 0
    trained = adapter if low_rank else shape.parameters
    weights = shape.parameters * (narrow if low_rank else FULL) + FULL * adapter
    spared = largest = 0
    if options.load_in_4bit:
        spared = int(shape.multiplied * (narrow - FOUR_BITS))
        # A layer's weights are there whole while they are multiplied.
        largest = narrow * max(inputs * outputs for _, inputs, outputs in shape.linear)
    weights -= spared
    # Under autocast each weight of a product is kept in bfloat16 until its gradient is there.
    multiplied = adapter if low_rank else shape.multiplied
    copies = 2 * multiplied if narrow == 2 else 0
    examples = options.rows_at_once
    again = options.gradient_checkpointing
    passed = Passed.of(lengths, sides, again).times(examples)
    kept, flowing = activations(shape, passed, narrow, low_rank=low_rank, again=again)
    seen = examples * sides * lengths.answer
    most = MAX_BYTES if device.kind == "cpu" else MAX_BYTES_ELSEWHERE
    logits = min(most, seen * shape.vocabulary * narrow)
    states = 3 * FULL * seen * shape.hidden
    if narrow < FULL and not low_rank:
        logits += narrow * shape.head
    of_head = 0 if low_rank else FULL * shape.head  # made with the loss, before the backward
    gradients, moments = FULL * trained, 2 * FULL * trained
    held = gradients if examples < options.batch_size else 0
    passing = copies + kept + of_head + states + max(logits, flowing + largest)
    peak = weights + moments + max(held + passing, gradients)
    if scores:
        base = narrow if low_rank else FULL
        cast = narrow == 2 and not low_rank
        scored = scoring(shape, base, device, cast=cast).peak + FULL * adapter
        peak = max(peak, scored - spared + largest)
    return Footprint(
        weights=weights,
        optimizer=moments,
        gradients=gradients,
        activations=passing,
        peak=peak,
    )


@dataclass(frozen=True)
class Passed:
    """What passes of an example: tokens, keys that attention sees as they are, and where it is
    masked those that it repeats for each head of queries, and the numbers of its masks."""

    tokens: int
    keys: int
    repeated: int = 0
    masks: int = 0

    @classmethod
    def of(cls, lengths: Lengths, sides: int, again: bool) -> Passed:
        """As kernels.grouped_hidden chooses: the prompt once for all sides where that pays."""
        whole = sides * lengths.both
        once = lengths.prompt + sides * lengths.answer
        if again or whole < WORTH * once:
            return cls(whole, whole)
        # Answers that go behind a cache are masked, and masked attention repeats the keys.
        return cls(once, lengths.prompt, whole, sides * lengths.answer * lengths.both)

    def times(self, examples: int) -> Passed:
        return Passed(*(examples * each for each in astuple(self)))


def activations(
    shape: Shape, passed: Passed, narrow: int, *, low_rank: bool = False, again: bool = False
) -> tuple[int, int]:
    """Bytes that a forward pass keeps for the backward, and that the backward has beside them while
    it goes through a layer.

    Of each token a layer of the Llama family (RMSNorm, rotary positions, SwiGLU, fused attention)
    keeps, with H = shape.hidden, Q = query, K = keys, I = inner and b = `narrow`, the bytes of a
    number in the products:

        two norms       their inputs and what they divide them by, in float32, and their outputs
                        before the weight where that is trained:  2 (4 H + 4 H) + 2 * 4
        their outputs   what products take: 2 * 4 H; under autocast cast for each of the five
                        products behind the norms:  5 b H
        attention       queries, its output (cast once more for an adapter), and of each head the
                        logarithm of a sum:  2 b Q + 4 heads, or 3 b Q + 4 heads;  of each key
                        2 b K, repeated 2 b Q;  of each number of a mask b
        MLP             gate, its activation, the other half, their product:  4 b I

    again: gradient checkpointing keeps each layer's input alone, and the backward makes the rest of
    a layer when it comes to it.
    Source: the method is that of Korthikanti et al. (2022), "Reducing Activation Recomputation in
    Large Transformer Models", arXiv 2205.05198, section 4.1, whose 34 s b h + 5 a s^2 b is of a GPT
    with dropout and unfused attention; the terms above are counted off transformers'
    models/llama/modeling_llama.py.
    """
    wide, hidden = FULL, shape.hidden
    norms = 2 * wide * hidden if low_rank else 4 * wide * hidden
    inputs = 2 * wide * hidden if narrow == FULL else 5 * narrow * hidden
    outputs = 2 if low_rank and narrow < FULL else 1
    attention = (1 + outputs) * narrow * shape.query + wide * shape.heads
    token = norms + 2 * wide + inputs + attention + 4 * narrow * shape.inner
    layer = passed.tokens * token
    layer += 2 * narrow * (passed.keys * shape.keys + passed.repeated * shape.query)
    layer += narrow * passed.masks
    ends = 3 * wide * passed.tokens * hidden  # embeddings, the last norm and its output
    flowing = passed.tokens * (4 * narrow * shape.inner + 4 * wide * hidden)
    if again:
        stream = narrow if low_rank else wide
        return shape.layers * passed.tokens * stream * hidden + ends, layer + flowing
    return shape.layers * layer + ends, flowing


def _passing(shape: Shape, tokens: int, narrow: int) -> int:
    """Of a pass that keeps nothing: the widest part of a layer, the two streams beside it."""
    return tokens * (3 * narrow * shape.inner + 3 * FULL * shape.hidden)
