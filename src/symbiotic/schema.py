"""The typed config: every number of ours, what it may be, and what it means.

Standard library only, so that a config is validated before torch is imported (spec: a wrong config costs
under two seconds). `parse` turns the plain dictionary that Hydra composed into these frozen dataclasses and
raises `ConfigError` with the full key, the value, and what would be right.

Open sets (data, callbacks, trainer, logger, benchmarks, optimizer) stay plain dictionaries with `_target_`;
they are built in `symbiotic.config.instantiate`, behind an allow-list.
"""

from __future__ import annotations

import dataclasses
import difflib
import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, TypeVar

KINDS = ("text", "prompt", "vit", "vae")
"""Token kinds, in the order of `Batch.kind`: words; the caption of a text-to-image sample; image patches that
the model reads; latents that it generates."""

TASKS = ("t2i", "t2i_long", "lm", "mmu")
"""Tasks, in the order of `Batch.task`: text-to-image with a short or a long caption, pure text, multimodal
understanding."""

GENERATION_TERMS = {"flow": "flow", "autoregressive": "image_ce"}
"""Objective -> the loss term of generated images; `objective.TERM_weight` is its weight."""

PARENT = "all"
"""Name of the one pool, router, shared expert and stream that every stage-0 parent consists of."""


ALARM_ACTIONS = ("warn", "rebalance", "revive", "stop")
"""What a collapse alarm may do."""


FINITE_POLICIES = ("stop", "skip")
"""What a step that is not finite leads to."""


class ConfigError(ValueError):
    """A config that cannot be run. The message is one line: key, value, what would be right."""


class RunError(RuntimeError):
    """A run that cannot go on, for a reason that one line explains: which file or step, what is wrong, what helps."""


class CollapseStop(RunError):
    """A run that its collapse alarm stopped: `callbacks.collapse_alarm.action=stop`."""

    status = 3


# --------------------------------------------------------------------------- the model


@dataclass(frozen=True)
class Router:
    """How a token picks its experts among the router columns that it sees."""

    top_k: int = 2
    normalize: bool = True  # renormalise the chosen k gates to sum to one (OLMoE, Qwen1.5-MoE: false)
    score: Literal["softmax", "sigmoid"] = "softmax"
    scale: float = 1.0  # factor on the routed sum (DeepSeek's routed_scaling_factor)
    bias: bool = False  # a bias per column that takes part in the choice, not in the gates (see `Balance.bias_rate`)


@dataclass(frozen=True)
class Attention:
    num_heads: int
    num_kv_heads: int
    head_dim: int
    qkv_bias: bool = False
    qk_norm: Literal["none", "head", "full"] = "head"
    rope_theta: float = 10_000.0


@dataclass(frozen=True)
class Vision:
    """A published image tower (SigLIP, CLIP) inside the model, which reads images; see `models.vision_tower`."""

    path: str  # a file of weights, or the folder with one and its open_clip_config.json
    trained: bool = True  # false: its weights stay, and have no optimiser state
    architecture: str | None = None  # name in open_clip (null: that of the config beside the weights)
    layer: int = 1  # whose output is taken, from the last block on
    resize: Literal["squash", "shortest", "longest"] | None = None  # null: as the tower was trained


@dataclass(frozen=True)
class Model:
    """Sizes and dials of the one backbone; the layout of the experts is the `System`."""

    width: int
    num_layers: int
    vocab_size: int
    num_experts: int  # routed experts per layer, over all pools
    expert_hidden: int
    shared_hidden: int  # hidden width of each shared expert (0: a pretrained model without any)
    attention: Attention
    router: Router
    gen_fraction: float = 0.25  # share of the routed experts in the generation pool (paper: 3:1)
    gated_shared: bool = False  # sigmoid gate on the shared expert (Qwen1.5-MoE); dense layers have none
    dense_layers: tuple[int, ...] = ()  # layers with a dense FFN in place of the experts (DeepSeek: the first)
    dense_hidden: int = 0
    norm_eps: float = 1e-6
    tied_head: bool = False
    patch_dim: int = 48  # numbers in one image patch, read or generated (4 x 4 pixels x 3 channels)
    max_grid: int = 16  # largest image side in patches
    init_std: float = 0.02
    vit_dim: int | None = None  # numbers in one vector of an image that is read (null: patch_dim)
    vision: Vision | None = None  # reads images in the place of `vit_in` alone, which projects what it says
    projector_hidden: int | None = None  # `vit_in` is Linear, GELU, Linear (LLaVA-1.5); null: one linear layer


# --------------------------------------------------------------------------- the system: layout as data


@dataclass(frozen=True)
class Shield:
    """Which components the generation gradient is kept out of, and how; *how far* is the phase's `shield` level.

    mode: `none`; `output` scales the gradient through the component's output; `weights` scales it for the weights of
    the target only (it still flows to lower layers); `strict` is `output`, and latent queries also attend
    to keys and values of all other tokens with their gradient scaled (ours: at level 1 exactly nothing leaks).
    targets: component -> kinds whose tokens are shielded; a component is `shared` (every shared expert),
    `shared.NAME` or `pools.NAME`.
    """

    mode: Literal["none", "output", "weights", "strict"] = "none"
    targets: dict[str, tuple[str, ...] | None] = field(default_factory=dict)


@dataclass(frozen=True)
class System:
    """One way to lay experts, routers, shared experts and attention out over the kinds of tokens.

    pools: name -> share of `model.num_experts` (null: an equal part of what the others leave). A pool is storage.
    routers: name of a set of router columns -> the pool it scores. Empty: one per pool, of the pool's name.
    visible: kind -> the column sets that its tokens see, under one softmax.
    shared: name of a shared expert -> the kinds that pass through it (null: no such expert).
    streams: name of a copy of attention and norms -> the kinds that use it.
    No pools at all means a dense model: the hidden width of the k routed experts goes to the shared expert.

    merge: how many of the parent's experts are one expert here, side by side: merge x as wide, `num_experts / merge`.
    top_k: experts that a token uses (null: `model.router.top_k`).
    gate: of a chosen expert. `router`: as `model.router` has it; `probability`: p, never renormalised;
    `straight_through`: 1 in the forward with the gradient of p, as a renormalised top-1 gate has none (ours).
    task_router: in every layer a learned router picks the row of `visible` for a token, by its predicted task; the row
    of its kind is the truth (UTAMoE, arXiv 2506.03591).
    alpha_scale: s of `y = s (alpha E + (1 - alpha) S)`, alpha learned in every layer from 1/2 on (UTAMoE: 1; 2 starts
    at the E + S that the parent was trained with). null: `y = E + S`.
    """

    name: str
    pools: dict[str, float | None] = field(default_factory=dict)
    routers: dict[str, str] = field(default_factory=dict)
    visible: dict[str, tuple[str, ...]] = field(default_factory=dict)
    shared: dict[str, tuple[str, ...] | None] = field(default_factory=dict)
    streams: dict[str, tuple[str, ...]] = field(default_factory=lambda: {PARENT: KINDS})
    shield: Shield = field(default_factory=Shield)
    merge: int = 1
    top_k: int | None = None
    gate: Literal["router", "straight_through", "probability"] = "router"
    task_router: bool = False
    alpha_scale: float | None = None


# --------------------------------------------------------------------------- optimisation


@dataclass(frozen=True)
class Schedule:
    """A role's own course of the learning rate; what is null is as for the other roles."""

    warmup: int | None = None
    decay: float | None = None
    shape: Literal["linear", "cosine"] | None = None


@dataclass(frozen=True)
class Rates:
    """Learning rates by role. Every parameter belongs to exactly one role, by regular expressions on its name.

    lr: the rate of every role that `by_role` does not name.
    warmup: optimiser steps of linear warm-up. decay: share of the joint steps, at the end, in which the rate falls to
    0, by `shape`. schedules: roles with a course of their own.
    """

    roles: dict[str, tuple[str, ...]]
    lr: float
    optimizer: dict[str, Any]
    by_role: dict[str, float | None] = field(default_factory=dict)
    warmup: int = 30
    decay: float = 0.3
    shape: Literal["linear", "cosine"] = "linear"
    clip: float = 1.0  # global gradient norm
    schedules: dict[str, Schedule] = field(default_factory=dict)


@dataclass(frozen=True)
class Condition:
    """A logged metric above or below a bound, at `logs` logs in a row (`log_every` steps apart)."""

    metric: str
    above: float | None = None
    below: float | None = None
    logs: int = 1


@dataclass(frozen=True)
class Phase:
    """A stretch of joint training, up to the optimiser step `until` (exclusive), or earlier: once `when` holds.

    shield: level in [0, 1]; the generation gradient through a shield target is scaled by 1 - shield.
    rate: role -> factor on its learning rate. frozen: roles whose gradients are dropped before the optimiser.
    balance: weight of the balance loss in this phase (null: `objective.balance_weight`).
    mix: weights of the data sets in this phase (null: those of the phase before, at first `mix.weights`). Only a phase
    that starts at a fixed step may have one, so that the data of every step is known beforehand.
    route_by: whether training sends a token to the experts of its predicted task, or to those of its true one. Without
    a task router both are the same; evaluation and sampling always go by the prediction.
    """

    name: str
    until: int
    shield: float = 0.0
    balance: float | None = None
    rate: dict[str, float] = field(default_factory=dict)
    frozen: tuple[str, ...] = ()
    mix: dict[str, float] | None = None
    when: Condition | None = None
    route_by: Literal["predicted", "truth"] = "predicted"


@dataclass(frozen=True)
class Phases:
    """The list is what runs; the numbers beside it are what its entries usually refer to."""

    steps: int
    shield_steps: int
    release_scale: float  # factor on the generation gradient through shield targets after the shielding
    list: tuple[Phase, ...]
    stage1_steps: int = 0  # UTAMoE: steps in which the experts of each task learn on it alone


@dataclass(frozen=True)
class Mix:
    """weights: data set -> share of the samples. drop: sets drawn but left out, so that the other samples of every
    micro-batch stay exactly those of the full mix (the understanding-only control at matched tokens)."""

    weights: dict[str, float]
    drop: tuple[str, ...] = ()


@dataclass(frozen=True)
class Lora:
    """Low-rank updates of the weights in joint training: `x W + (alpha / rank) x A B` (arXiv 2106.09685).

    rank: 0: none. targets: regular expressions, searched in the names of parameters; projections of the attention and
    weights of routed and shared experts can have an update.
    """

    rank: int = 0
    alpha: float = 16.0
    targets: tuple[str, ...] = ()


@dataclass(frozen=True)
class Sampler:
    """Image sampling. guidance: classifier-free (1 = none).

    flow: Euler steps, time shift (1 = none). autoregressive: of each code, by its logits over `temperature` (0: the
    likeliest), among the `top_k` likeliest (0: all), and of these the fewest that reach the probability `top_p`.
    """

    steps: int = 12
    guidance: float = 2.0
    time_shift: float = 1.0
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0


SAMPLING = {"flow": ("steps", "time_shift"), "autoregressive": ("temperature", "top_k", "top_p")}
"""Objective -> the keys of `Sampler` that only its images are drawn by."""


@dataclass(frozen=True)
class Balance:
    """How the use of the experts is balanced.

    The loss is n * sum_i f_i P_i per router, f_i the share of its assignments (they sum to 1), P_i the mean
    probability: 1 at balance. Code whose f counts the k choices of a token (sums to k) uses weights k times smaller.
    scope: `router`: the mean over the routers that had tokens; `global`: all tokens as if they had one router (with
    pools that not all of them see, the loss is then not 1 when each pool is balanced).
    reduction: over the MoE layers. With `mean` the loss is 1 at balance, with `sum` the number of layers.
    kinds: kind -> weight of its tokens in f and P (1 for a kind that is not named); a router counts by their mean.
    bias_rate: u of the aux-loss-free balancing (arXiv 2408.15664): after each step `b += u sign(mean load - load)`,
    per router; experts are chosen by score + b and weighed by the score. 0: none. Needs `model.router.bias`.
    """

    scope: Literal["router", "global"] = "router"
    reduction: Literal["mean", "sum"] = "mean"
    kinds: dict[str, float] = field(default_factory=dict)
    bias_rate: float = 0.0


@dataclass(frozen=True)
class Surgery:
    """What is done about gradients of the two tasks (understanding: CE; generation: flow) that conflict.

    maop: after the clip, where a gradient points against Adam's first moment, that part of it is taken out (Rosetta).
    pcgrad, cagrad, upgrad: the tasks' gradients are combined by torchjd's aggregator of that name in place of their
    sum; the gradient of balance and z-loss is added as it is.
    roles: whose parameters are treated (empty: all).
    """

    method: Literal["none", "maop", "pcgrad", "cagrad", "upgrad"] = "none"
    roles: tuple[str, ...] = ()
    cagrad_c: float = 0.5  # 0: the mean of the tasks' gradients; larger: further towards the worse-off task


@dataclass(frozen=True)
class Objective:
    """`ce_weight * CE + flow_weight * flow + balance_weight * balance + z_weight * z`, and with a task router
    `+ task_weight * CE(task router, true task)`; `Balance` says how the balance loss is normalised. With the name
    `autoregressive`, `image_ce_weight * image_ce` in the place of the flow.

    flow: mean squared error over latents, on the clean data (`x`) or on the velocity.
    time: sigmoid(n), n ~ Normal(time_mean, time_std).
    image_ce: cross-entropy of the codes (nats a code) that `image_tokenizer` makes of the images.
    image_tokenizer: `_target_` of what trains or loads it (see `symbiotic.images`). codebook_size: its codes.
    """

    name: Literal["flow", "autoregressive"] = "flow"
    prediction: Literal["x", "velocity"] = "x"
    ce_weight: float = 1.0
    flow_weight: float = 1.0
    image_ce_weight: float = 1.0
    balance_weight: float = 0.01
    balance: Balance = field(default_factory=Balance)
    z_weight: float = 0.0
    task_weight: float = 1.0
    time_mean: float = 0.0
    time_std: float = 1.0
    caption_dropout: float = 0.1
    codebook_size: int = 0
    image_tokenizer: dict[str, Any] | None = None
    sampler: Sampler = field(default_factory=Sampler)


# --------------------------------------------------------------------------- start, data, run


@dataclass(frozen=True)
class Stage0:
    """Understanding-only pre-training of the parent: the stand-in for a pretrained vision-language MoE."""

    max_steps: int
    lr: float
    mix: Mix
    samples: int  # per micro-batch
    warmup: int = 30
    decay: float = 0.3
    balance_weight: float = 0.02


@dataclass(frozen=True)
class Init:
    """Where joint training starts: a stage-0 parent trained (or cached) by this config, a checkpoint of one, or a
    pretrained model.

    folder: that of a Hugging Face mixture-of-experts checkpoint (`symbiotic.convert.families`).
    assignment: which experts go to which pool; `file`: as `assignment_file` says, the receipt of a run or a list of
    pools by layer (`symbiotic.convert.assignment`). router: columns sliced from the parent's, or drawn anew.
    gen_experts: experts of pools that only latents see keep the parent's weights, or are drawn anew.
    parent_shared: whether the parent has a shared expert (null: if the system has one); true for a system without
    removes it after stage 0.
    """

    stage0: Stage0 | None = None
    checkpoint: str | None = None
    folder: str | None = None
    assignment: Literal["profiled", "random", "contiguous", "file"] = "profiled"
    router: Literal["sliced", "fresh"] = "sliced"
    gen_experts: Literal["inherited", "random"] = "inherited"
    parent_shared: bool | None = None
    profile_micro_batches: int = 4
    assignment_file: str | None = None


@dataclass(frozen=True)
class Data:
    """source: `_target_` of what writes or finds the shards (see `symbiotic.data.embedded`).
    sets: the data sets that it holds (families of shards), to which a mix gives weights.

    A step consists of `micro_batches` micro-batches of `samples` samples each, packed to rows of `row_tokens`
    tokens. Devices and accumulation only share the micro-batches out: their content never depends on them.
    """

    source: dict[str, Any]
    sets: tuple[str, ...]
    samples: int
    row_tokens: int
    micro_batches: int = 1
    num_workers: int = 0
    repeat_steps: int = 0  # train on the first n steps' micro-batches over and over, to see a loss go to 0 (0: never)
    encoded: tuple[str, ...] = ()  # folders of vectors of the images, by src/encode_shards.py, in the place of pixels
    autoencoder: dict[str, Any] | None = None  # `_target_` of what made those of generated images: it draws them
    vision: dict[str, Any] | None = None  # `_target_` of what made those of images that are read: for benchmarks


@dataclass(frozen=True)
class Evaluation:
    """The embedded benchmarks, and others behind them. every: joint steps between in-loop evaluations (0: only before
    and after)."""

    every: int = 0
    quick: float = 1.0  # share of the samples that in-loop evaluations take; below 1 their scores are called quick/NAME
    questions: int = 192  # knowledge questions, replayed and unreplayed together
    readings: int = 200
    images: int = 96
    batch_size: int = 96
    caption_tokens: int = 4096  # of captions that configured benchmarks draw from; longer ones are named and left out
    benchmarks: dict[str, dict[str, Any] | None] = field(default_factory=dict)  # name -> `_target_` and its arguments
    scorers: Literal["default", "tiny"] = "default"  # judges of the images; tiny: plumbing, judges nothing well


@dataclass(frozen=True)
class Paths:
    runs: str
    data: str
    cache: str


@dataclass(frozen=True)
class Config:
    """Everything that `src/train.py` runs on."""

    name: str
    seed: int
    threads: int
    dry_run: bool
    log_every: int
    save_every: int
    system: System
    model: Model
    rates: Rates
    phases: Phases
    mix: Mix
    objective: Objective
    init: Init
    data: Data
    evaluation: Evaluation
    paths: Paths
    trainer: dict[str, Any]
    callbacks: dict[str, dict[str, Any] | None]
    logger: dict[str, dict[str, Any] | None]
    run_dir: str
    surgery: Surgery = field(default_factory=Surgery)
    lora: Lora = field(default_factory=Lora)
    compile: Literal["none", "inductor", "aot_eager"] = "none"  # torch.compile of every block, by this backend
    recompute: bool = False  # activation checkpointing: blocks are computed again in the backward pass
    probe_samples: int = 16  # samples of the fixed batch that drift and conflicts are measured on
    ablation: Any = None
    study: Any = None  # of which the run is a member; see `symbiotic.studies.study`
    metric: str | None = "knowledge_unreplayed"  # what train.py returns to a sweeper; null: nothing
    parent_only: bool = False  # end when the corpus and the parent are there
    allow_changes: tuple[str, ...] = ()  # keys in which a run that goes on may differ from how it began; on record


# --------------------------------------------------------------------------- evaluation of finished runs


@dataclass(frozen=True)
class SamplerChange:
    """What is changed of a run's own `Sampler`; null: nothing."""

    steps: int | None = None
    guidance: float | None = None
    time_shift: float | None = None
    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None


@dataclass(frozen=True)
class EvalConfig:
    """Everything that `src/eval.py` runs on: one checkpoint (`run`), or every finished run below a folder (`runs`).

    checkpoint, step, ema: which weights (see `symbiotic.trained.weights_file`); default: what the run ended with.
    data: the folder of corpora, where it was moved. only: names of benchmarks; empty: all.
    seed: draws the noise that images start from; null: the run's own, as at the end of its training.
    study, factors, report, evaluate: of the report, which is written for `runs` only. study: the option chosen.
    """

    evaluation: Evaluation
    run: str | None = None
    runs: str | None = None
    checkpoint: str | None = None
    step: int | None = None
    ema: bool = False
    data: str | None = None
    device: str = "cpu"
    threads: int = 1
    seed: int | None = None
    sampler: SamplerChange = field(default_factory=SamplerChange)
    only: tuple[str, ...] = ()
    study: str = "none"
    factors: tuple[str, ...] | None = None
    report: str | None = None
    evaluate: bool = True


# --------------------------------------------------------------------------- dictionary -> dataclass

T = TypeVar("T")


def near_miss(word: str, known: typing.Iterable[str]) -> str:
    """`; did you mean X?` when a known word is close, else the list of what is known."""
    known = sorted(known)
    close = difflib.get_close_matches(word, known, n=1, cutoff=0.6)
    return f"did you mean {close[0]!r}?" if close else f"known: {', '.join(known) or 'nothing'}"


def parse(cls: type[T], value: Any, key: str = "") -> T:
    """Build the dataclass `cls` from a plain mapping, checking keys and types on the way down.

    Raises:
        ConfigError: an unknown key (with the near miss), a missing one, or a value of another type.
    """
    return typing.cast(T, _convert(cls, value, key))


def _convert(hint: Any, value: Any, key: str) -> Any:
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if hint is Any:
        return _filled(value, key)
    if dataclasses.is_dataclass(hint) and isinstance(hint, type):
        return _dataclass(hint, value, key)
    if origin in (typing.Union, types.UnionType):
        if value is None and type(None) in args:
            return None
        return _convert(next(a for a in args if a is not type(None)), value, key)
    if origin is Literal:
        if value not in args:
            raise ConfigError(f"{key}={value!r}: must be one of {', '.join(map(str, args))}")
        return value
    if origin is dict:
        if not isinstance(value, Mapping):
            raise ConfigError(f"{key}={value!r}: must be a mapping")
        return {str(k): _convert(args[1], v, f"{key}.{k}") for k, v in value.items()}
    if origin is tuple:
        if isinstance(value, (str, Mapping)) or not hasattr(value, "__iter__"):
            raise ConfigError(f"{key}={value!r}: must be a list")
        return tuple(_convert(args[0], v, f"{key}[{i}]") for i, v in enumerate(value))
    return _scalar(hint, value, key)


def _filled(value: Any, key: str) -> Any:
    """A plain value as it is, if nothing in it was left open."""
    if isinstance(value, Mapping):
        return {name: _filled(child, f"{key}.{name}") for name, child in value.items()}
    if isinstance(value, (list, tuple)):
        return [_filled(child, f"{key}[{i}]") for i, child in enumerate(value)]
    if value == "???":
        raise ConfigError(f"{key}: missing; it has no default")
    return value


def _scalar(hint: type, value: Any, key: str) -> Any:
    if value == "???":
        raise ConfigError(f"{key}: missing; it has no default")
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if hint is float and isinstance(value, str):  # YAML 1.1 reads 1e-4 as a string
        try:
            return float(value)
        except ValueError:
            pass
    if not isinstance(value, hint) or (hint is not bool and isinstance(value, bool)):
        raise ConfigError(f"{key}={value!r}: must be {hint.__name__}, not {type(value).__name__}")
    return value


def _dataclass(cls: type, value: Any, key: str) -> Any:
    if value == "???" or not isinstance(value, Mapping):
        raise ConfigError(f"{key}={value!r}: must be a mapping with the keys of {cls.__name__}")
    hints = typing.get_type_hints(cls)
    fields = {f.name: f for f in dataclasses.fields(cls)}
    prefix = f"{key}." if key else ""
    for name in value:
        if name not in fields:
            raise ConfigError(f"{prefix}{name}: no such key; {near_miss(str(name), fields)}")
    for name, f in fields.items():
        required = f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING
        if name not in value and required:
            raise ConfigError(f"{prefix}{name}: missing; it has no default")
    return cls(**{name: _convert(hints[name], v, f"{prefix}{name}") for name, v in value.items()})
