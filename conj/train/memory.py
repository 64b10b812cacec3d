"""What a rank of stages 5 and 6 holds, in bytes, by count: GPU, host, disk. Without torch, so that a plan is quick.

A step has few moments at which most stands; each is a sum of named parts, and the peak is the largest sum. The parts follow
what FSDP2, autograd and conj's own kernels keep (the table in docs/performance.md), for Triton kernels and flash attention;
scripts/count_step.py counts the same with the real code, and a test holds the two together. Not counted, but allowed for
in `usable`: the CUDA context, NCCL's buffers, and what the allocator cannot use of its blocks.

Letters: T tokens of a pack, G keys gathered for its segments, M predicted tokens, and those of conj/model/decoder.py.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from math import prod

from conj.data.packs import Group, group_tokens
from conj.data.tokens import TokenizedPairs
from conj.model.config import ModelConfig, parameter_shapes

GIB = 2**30
LOGITS = 8192  # rows and columns of a block of logits on a GPU, conj/model/logprob.py
PINNED_CHUNKS = 2 * 128 * 2**20  # through which a checkpoint crosses, conj/train/checkpoint.py
STATE_BYTES = 12  # a parameter: master weight and AdamW's two moments, fp32
HOST_PROCESS = 4 * GIB  # allowed for torch, CUDA's libraries and Python in each process


@dataclass(frozen=True, kw_only=True)
class PackShape:
    """How large a pack is: T, M and G."""

    tokens: int
    predicted: int
    keys: int

    def scaled(self, tokens: int) -> "PackShape":
        """A pack of other size, made of the same."""
        predicted, keys = (number * tokens // self.tokens for number in (self.predicted, self.keys))
        return PackShape(tokens=tokens, predicted=predicted, keys=keys)


def pack_shape(pairs: TokenizedPairs, pack: list[Group]) -> PackShape:
    """Of a planned pack. A judgment's queries see their prompt's keys and their own, but for the token never read."""
    tokens = predicted = keys = 0
    for group in pack:
        judgments = sum(pairs.judgment_tokens[pair] for pair in group.pairs)
        tokens += group_tokens(pairs, group)
        predicted += judgments + 2 * len(group.pairs)
        keys += group_tokens(pairs, group) + 2 * len(group.pairs) * pairs.prompt_tokens[group.prompt]
    return PackShape(tokens=tokens, predicted=predicted, keys=keys)


@dataclass(frozen=True, kw_only=True)
class Memory:
    """The moment at which most stands, and what does then: bytes by name."""

    moment: str
    parts: dict[str, int]

    @property
    def total(self) -> int:
        return sum(self.parts.values())


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """Numbers of parameters: of all, of a block, of its largest matrix, of the head (or the tied embeddings), and of
    embeddings of their own."""

    all: int
    block: int
    matrix: int
    head: int
    embedding: int

    @classmethod
    def of(cls, config: ModelConfig) -> "Sizes":
        shapes = {name: prod(shape) for name, shape in parameter_shapes(config).items()}
        head = config.vocab_size * config.hidden_size
        return cls(
            all=sum(shapes.values()), block=sum(n for name, n in shapes.items() if name.startswith("model.layers.0.")),
            matrix=config.hidden_size * config.intermediate_size, head=head,
            embedding=0 if config.tie_word_embeddings else head,
        )  # fmt: skip


def usable(gpu_bytes: int, num_ranks: int) -> int:
    """What tensors may take of a GPU: all but a share for the allocator, and an allowance for the CUDA context and NCCL."""
    return int(0.96 * gpu_bytes) - (GIB if num_ranks == 1 else 3 * GIB)


@dataclass(frozen=True, kw_only=True)
class Block:
    """What a block keeps of a pack from forward to backward, and the most that its backward holds, its kept included."""

    kept: int
    backward: int

    @classmethod
    def of(cls, config: ModelConfig, pack: PackShape, how: str, width: int) -> "Block":
        """`how`: the activation checkpointing; `width`: bytes of a number."""
        hidden, mlp = pack.tokens * config.hidden_size * width, pack.tokens * config.intermediate_size * width
        heads = pack.tokens * config.num_attention_heads * config.head_dim
        keys = 2 * pack.keys * config.num_key_value_heads * config.head_dim * width  # and values, gathered
        sums = 4 * pack.tokens * (config.num_attention_heads + 2)  # of the softmax, and of two norms
        normed = heads + pack.tokens * config.num_key_value_heads * config.head_dim if config.qk_norm else 0
        attended = 2 * heads * width + normed * width + keys + sums  # queries and what attention gives; its inputs
        whole = 4 * hidden + attended + 3 * mlp  # x and x + attention, their norms; gate, up and their product
        kept = {"none": whole, "selective": whole - 2 * hidden - mlp, "full": hidden}[how]
        # SwiGLU's backward: its input's and its output's gradients beside what the block has kept, less the product.
        of_mlp = (kept if how == "selective" else whole - mlp) + hidden + 3 * mlp
        # Attention's: flash attention sums the queries' gradients in fp32, and those of keys for each query head.
        scratch = 4 * heads + 2 * pack.keys * config.num_attention_heads * config.head_dim * width
        of_attention = 4 * hidden + 2 * attended + scratch
        return cls(kept=kept, backward=max(of_mlp, of_attention))


def step_memory(
    config: ModelConfig,
    pack: PackShape,
    *,
    num_ranks: int = 1,
    num_shards: int | None = None,  # ranks that share one copy of the state; all if not given
    num_turns: int = 2,  # packs of a rank in a step; the second finds the first one's gradients
    activation_checkpointing: str = "none",
    audit_mode: bool = False,
    cpu_offload: bool = False,
    reshard_after_forward: bool = True,
    width: int = 2,  # bytes of a number in computation
) -> Memory:
    """The peak of a GPU in a step whose packs are all of this shape."""
    step = _Step(
        config=config, sizes=Sizes.of(config), pack=pack, width=width, shards=num_shards or num_ranks,
        block=Block.of(config, pack, activation_checkpointing, width), how=activation_checkpointing,
        wrapped=num_ranks > 1 or cpu_offload or audit_mode, is_later=num_turns > 1, audit_mode=audit_mode,
        cpu_offload=cpu_offload, reshard=reshard_after_forward,
    )  # fmt: skip
    return max(step.moments(), key=lambda memory: memory.total)


@dataclass(frozen=True, kw_only=True)
class _Step:
    config: ModelConfig
    sizes: Sizes
    pack: PackShape
    width: int
    shards: int
    block: Block
    how: str
    wrapped: bool  # in FSDP2
    is_later: bool  # not the first pack of a step
    audit_mode: bool
    cpu_offload: bool
    reshard: bool

    def moments(self) -> Iterator[Memory]:
        num_blocks = self.config.num_hidden_layers
        yield self._moment("backward of the head", num_blocks, 0, **self._head())
        for number in sorted({num_blocks - 1, max(0, num_blocks - 2), 0}):
            done = num_blocks - 1 - number
            yield self._moment("backward of a block", number, done, **self._block(number))
            yield self._moment("reduction of a block", number, done, **self._reduced_block(number))
        for how in self._end():
            yield self._moment("backward of the embeddings", 0, num_blocks, **how)
        one = 0 if self.cpu_offload else 4 * self.sizes.all // self.shards
        # Not fused, as in audit mode, AdamW takes the square root of all second moments at once.
        yield Memory(moment="the optimizer's step", parts={
            "weights and moments": 3 * one, "gradients": one, "work": one if self.audit_mode else 0})  # fmt: skip

    def _moment(self, name: str, left: int, done: int, *, gathered: int, gradients: int, work: int) -> Memory:
        """At which `left` blocks are still to be gone back through, and the gradients of `done` blocks are reduced."""
        kept = left * self.block.kept + 2 * self.pack.tokens * self.config.head_dim * self.width
        return Memory(moment=name, parts={
            "weights and moments": 0 if self.cpu_offload else STATE_BYTES * self.sizes.all // self.shards,
            "gradients": self._standing(done) + gradients, "gathered weights": gathered,
            "kept for the backward": kept, "work": work,
        })  # fmt: skip

    def _standing(self, done: int) -> int:
        """Gradients of the step's packs so far, and of this one's blocks that are `done`."""
        sizes = self.sizes
        reduced = 0 if self.cpu_offload else 4 * done * sizes.block // self.shards
        if self._accumulates:
            return 8 * (sizes.all - done * sizes.block) + reduced
        if self.is_later:
            return 0 if self.cpu_offload else 4 * sizes.all // self.shards
        return reduced

    @property
    def _accumulates(self) -> bool:
        """Whether gradients of the step's packs so far stand unsharded, in float64, until the last pack's are added."""
        return self.audit_mode and self.is_later

    @property
    def _reduced(self) -> int:
        """Bytes of a number where gradients are summed."""
        return 8 if self.audit_mode else 4

    @property
    def _waiting(self) -> int:
        """The head's gradient on one rank, in fp32, from its backward on: it is the first of its parameter in the step, or
        those of tied embeddings are still to be added."""
        return 4 * self.sizes.head if not (self.is_later and self.sizes.embedding) else 0

    def _reduction(self, size: int) -> int:
        """A group's gradients, their copy that is sent, and what comes back, of float64 also as fp32."""
        own = 0 if self._accumulates else self.width * size  # else they count among those that stand
        back = (self._reduced + (4 if self.audit_mode else 0)) * size // self.shards
        if self.shards > 1:
            return own + self._reduced * size + back
        return self._reduced * size + max(own, back - (8 * size if self._accumulates else 0))  # they are gone by then

    def _gathered(self, num_blocks: int, current: int) -> int:
        """The head, `current` blocks' worth of copies in use and coming; or all blocks and embeddings, never given back."""
        others = current * self.sizes.block if self.reshard else num_blocks * self.sizes.block + self.sizes.embedding
        return self.width * (self.sizes.head + others)

    def _coming(self, number: int) -> int:
        """What is gathered ahead of its use while a block goes back: the one below it, in the end the embeddings."""
        if self.shards == 1 or not self.reshard:
            return 0
        return self.width * (self.sizes.block if number else self.sizes.embedding)

    def _head(self) -> dict[str, int]:
        rows, columns = min(LOGITS, self.pack.predicted), min(LOGITS, self.config.vocab_size)
        hidden, head = self.pack.predicted * self.config.hidden_size, self.width * self.sizes.head
        logits = rows * columns * (2 * 4 + self.width)  # a block, the one before it, and the gradient of one
        logits += LOGITS * self.config.hidden_size * 4 if self.pack.predicted > LOGITS else 0
        after = self.pack.tokens * self.config.hidden_size * self.width  # the last block's result
        work = after + (self.width + 4) * hidden
        if self.wrapped:
            ahead = 1 if self.shards > 1 else 0
            return {
                "gathered": self._gathered(self.config.num_hidden_layers, ahead), "gradients": head, "work": work + logits
            }  # fmt: skip
        # On one rank the head's copy goes, and its gradient is cast to be added up in fp32.
        if self.width == 4 or self.width * self.sizes.head + logits > 4 * self.sizes.head:
            return {"gathered": head * (self.width != 4), "gradients": head, "work": work + logits}
        return {"gathered": 0, "gradients": head + 4 * self.sizes.head, "work": work}

    def _block(self, number: int) -> dict[str, int]:
        sizes, matrix = self.sizes, self.width * self.sizes.matrix
        if not self.wrapped:
            copies = self.width * sizes.block if self.how == "full" else matrix
            return {
                "gathered": copies if self.width != 4 else 0,
                "gradients": self._waiting + matrix,
                "work": self.block.backward,
            }
        is_last = number == self.config.num_hidden_layers - 1
        sent = 0 if is_last else self._reduced * sizes.block  # of the block before
        return {
            "gathered": self._gathered(number + 1, 1) + self._coming(number),
            "gradients": self.width * sizes.head + matrix + sent, "work": self.block.backward,
        }  # fmt: skip

    def _reduced_block(self, number: int) -> dict[str, int]:
        """All of a block's gradients are there, and copied for the reduction; its weights are given back."""
        hidden = self.pack.tokens * self.config.hidden_size * self.width
        if not self.wrapped:
            return {
                "gathered": 0,
                "gradients": self._waiting + (self.width + 4) * self.sizes.matrix,
                "work": 3 * hidden,
            }
        return {
            "gathered": self._gathered(number, 0) + self._coming(number),
            "gradients": self.width * self.sizes.head + self._reduction(self.sizes.block), "work": 2 * hidden,
        }  # fmt: skip

    def _end(self) -> Iterator[dict[str, int]]:
        sizes, hidden, is_tied = self.sizes, self.pack.tokens * self.config.hidden_size, not self.sizes.embedding
        if not self.wrapped:
            made = 4 * sizes.head * (2 if is_tied else 1)  # and, tied, its sum with the head's
            yield {"gathered": 0, "gradients": self._waiting + made, "work": (self.width + 4) * hidden}
            return
        head, embedding, sent = self.width * sizes.head, self.width * sizes.embedding, self._reduced * sizes.block
        made = 2 * head if is_tied else embedding
        yield {"gathered": head + embedding, "gradients": head + made + sent, "work": self.width * hidden}
        yield {"gathered": embedding, "gradients": embedding + self._reduction(sizes.head), "work": 0}
        if embedding and not self._accumulates:  # the head's are reduced
            done = 0 if self.is_later or self.cpu_offload else 4 * sizes.head // self.shards
            yield {"gathered": 0, "gradients": done + self._reduction(sizes.embedding), "work": 0}


def reference_memory(
    config: ModelConfig, pack: PackShape, *, num_ranks: int = 1, num_shards: int | None = None, width: int = 2
) -> Memory:
    """The peak of a GPU in stage 5, which goes forward only; arguments as in `step_memory`."""
    sizes = Sizes.of(config)
    hidden, mlp = pack.tokens * config.hidden_size * width, pack.tokens * config.intermediate_size * width
    heads = pack.tokens * config.num_attention_heads * config.head_dim * width
    logits = 2 * 4 * min(LOGITS, pack.predicted) * min(LOGITS, config.vocab_size)
    head = width * sizes.head if num_ranks > 1 or width != 4 else 0  # gathered before all blocks, or cast after them
    block = 2 * width * sizes.block if num_ranks > 1 else 0
    weights = {"weights": 4 * sizes.all // (num_shards or num_ranks)}
    moments = [  # at the start head and embeddings, each as it arrives and as it is used
        Memory(moment="the start", parts=weights | {
            "gathered weights": 2 * width * (sizes.head + sizes.embedding) if num_ranks > 1 else 0, "work": hidden}),
        Memory(moment="a block", parts=weights | {
            "gathered weights": block + (head if num_ranks > 1 else width * sizes.matrix), "work": 5 * hidden + 2 * heads + 3 * mlp}),
        Memory(moment="the head", parts=weights | {
            "gathered weights": head, "work": hidden + width * pack.predicted * config.hidden_size + logits}),
    ]  # fmt: skip
    return max(moments, key=lambda memory: memory.total)


def host_memory(config: ModelConfig, *, num_shards: int, num_local: int, cpu_offload: bool) -> dict[str, int]:
    """What stage 6 takes of the memory of one machine, on which `num_local` ranks are, that holds the first copy of the model
    or a part of it: bytes by name. `num_shards`: ranks that share a copy."""
    size = Sizes.of(config).all
    copy = STATE_BYTES * size // num_shards + PINNED_CHUNKS
    parts = {"processes": num_local * HOST_PROCESS, "copy of the state for checkpoints": num_local * copy}
    if cpu_offload:
        shards = [prod((-(-rows // num_shards), *rest)) for rows, *rest in parameter_shapes(config).values()]
        # torch rounds a pinned block up to a power of two.
        pinned = sum(1 << (4 * size - 1).bit_length() for size in shards)
        parts |= {"weights and gradients, pinned": num_local * 2 * pinned}
        parts |= {"moments": num_local * 8 * size // num_shards}
    return parts


def disk_bytes(config: ModelConfig, keep_checkpoints: int, exported_width: int = 2) -> dict[str, int]:
    """What stage 6 leaves on the disk, at most: a new checkpoint is whole before the oldest goes."""
    size = Sizes.of(config).all
    return {"checkpoints": (keep_checkpoints + 1) * STATE_BYTES * size, "model": exported_width * size}
