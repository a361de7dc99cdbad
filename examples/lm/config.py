"""Everything that can be set, as frozen dataclasses: their fields are the command line's flags."""

import dataclasses
import math
from dataclasses import dataclass, field
from typing import Any, Literal


class UsageError(Exception):
    """The user asked for something that cannot be: one sentence for them, no traceback."""


@dataclass(frozen=True)
class ModelConfig:
    """A GPT-2: pre-norm, learned positions, GELU, biases, tied embeddings.

    Attributes:
      layers: transformer blocks.
      width: features of the residual stream.
      heads: attention heads, each of width / heads features.
      context: the longest sequence, in tokens.
      vocab_size: tokens that exist; None takes the tokenizer's.
      init_scale: standard deviation of the initial weights.
    """

    layers: int
    width: int
    heads: int
    context: int
    vocab_size: int | None = None
    init_scale: float = 0.02


# "10m" has the sizes of nanoGPT's character model. Initial weights shrink as 1 / sqrt(width).
MODELS = {
    "tiny": ModelConfig(layers=2, width=64, heads=4, context=128, init_scale=0.06),
    "1m": ModelConfig(layers=5, width=128, heads=4, context=256, init_scale=0.05),
    "10m": ModelConfig(layers=6, width=384, heads=6, context=256, init_scale=0.028),
    "30m": ModelConfig(layers=6, width=640, heads=10, context=512, init_scale=0.022),
    "gpt2-124m": ModelConfig(layers=12, width=768, heads=12, context=1024, vocab_size=50257),
    "gpt2-355m": ModelConfig(layers=24, width=1024, heads=16, context=1024, vocab_size=50257),
    "gpt2-774m": ModelConfig(layers=36, width=1280, heads=20, context=1024, vocab_size=50257),
    "gpt2-1.5b": ModelConfig(layers=48, width=1600, heads=25, context=1024, vocab_size=50257),
}


@dataclass(frozen=True)
class MeshConfig:
    """How many devices lie along each axis of the mesh; one of them may be -1, for "the rest".

    Attributes:
      data: replicas of the params, each with its share of the batch.
      fsdp: shards of the params, each with its share of the batch too.
      tensor: shards of heads and hidden features, all with the same share of the batch.
    """

    data: int = -1
    fsdp: int = 1
    tensor: int = 1


@dataclass(frozen=True)
class HostConfig:
    """How the processes of a run on several machines find each other.

    Attributes:
      auto: ask the TPU pod, SLURM or GKE that started the processes.
      coordinator: else, host:port of the process 0.
      processes: how many there are.
      process: which of them this is.
      timeout: seconds without a sign of life after which a process counts as dead.
    """

    auto: bool = False
    coordinator: str | None = None
    processes: int | None = None
    process: int | None = None
    timeout: int = 100


@dataclass(frozen=True)
class Hyperparameters:
    """What the optimizers are built from. None stands for the optimizer's own default.

    Attributes:
      learning_rate: the peak of the schedule.
      b1: decay of the gradient's average.
      b2: decay of the second moment's, or of the curvature's, average.
      gamma: Sophia's scale of the curvature. Raise it when the win rate is below 0.1.
      win_rate: the share of coordinates to leave unclipped; gamma then follows from it.
      weight_decay: decoupled, on matrices only.
      warmup: the share of the run in which the rate rises from 0 to its peak.
      basis_interval: steps from one refresh of the eigenbasis to the next.
      update_interval: steps from one curvature estimate to the next.
      clip_norm: the largest global norm of a gradient.
    """

    learning_rate: float | None = None
    b1: float | None = None
    b2: float | None = None
    gamma: float | None = None
    win_rate: float | None = None
    weight_decay: float | None = None
    warmup: float | None = None
    basis_interval: int | None = None
    update_interval: int = 10
    clip_norm: float = 1.0


@dataclass(frozen=True)
class RunConfig:
    """What is trained, and on what: the settings that all commands share.

    Attributes:
      model: a name in `MODELS`.
      layers: transformer blocks; the model's own number if left out, as the three below.
      width: features of the residual stream.
      heads: attention heads; they divide the width.
      context: the longest sequence, in tokens.
      dropout: the share of the features that training sets to 0, after the embedding and in each
        block; curvature and validation use all of them.
      data: where the text comes from: "stdlib", the sources of the running Python's library;
        "packages", those and the sources of what is installed; "text:PATTERN", files;
        "bin:FOLDER", nanoGPT's train.bin and val.bin; "hf:NAME" or "hf:NAME:CONFIG", a Hugging
        Face dataset with a column "text", streamed.
      tokenizer: "bytes"; "bpe:SIZE", learnt from the text; "gpt2", if tiktoken is installed.
      steps: optimizer steps.
      batch_size: sequences in a step, over all devices and microbatches.
      accumulate: microbatches that a step is cut into, to save memory.
      curvature_batch: sequences that a curvature estimate sees; half the batch, or the nearest
        divisor below, if left out.
      refresh: "cond" branches on the device; "host" compiles two steps and picks one.
      remat: recompute each block's activations in the backward pass, to save memory.
      attention: XLA's own, or cuDNN's fused kernel, which Hutchinson's estimator goes around.
      mesh: the devices' layout.
      seed: of the params, the order of the data and dropout.
      eval_batches: batches in a validation.
      out: where results go; runs/<time>-<command> if left out.
      resume: continue what is in `out`, with its settings.
      stop_on_nan: end a run whose loss or gradient is not finite, without another checkpoint.
    """

    model: str = "tiny"
    layers: int | None = None
    width: int | None = None
    heads: int | None = None
    context: int | None = None
    dropout: float = 0.0
    data: str = "stdlib"
    tokenizer: str = "bytes"
    steps: int = 1500
    batch_size: int = 16
    accumulate: int = 1
    curvature_batch: int | None = None
    refresh: Literal["cond", "host"] = "cond"
    remat: bool = False
    attention: Literal["xla", "cudnn"] = "xla"
    mesh: MeshConfig = field(default_factory=MeshConfig)
    seed: int = 0
    eval_batches: int = 16
    out: str | None = None
    resume: bool = False
    stop_on_nan: bool = True


@dataclass(frozen=True)
class LoopConfig(RunConfig):
    """What happens around the steps: processes, validations, logs, checkpoints.

    Attributes:
      hosts: the processes, where there are several.
      eval_interval: steps from one validation to the next.
      log_interval: steps from one logged line to the next.
      save_interval: steps from one checkpoint to the next.
      keep: how many checkpoints are kept.
      on_save_error: what to do when a checkpoint cannot be written, as on a full disk.
      profile: steps that JAX's profiler records, for TensorBoard and Perfetto; 10 hold one
        curvature estimate.
      wandb: the project of Weights & Biases that the lines are sent to as well.
    """

    hosts: HostConfig = field(default_factory=HostConfig)
    eval_interval: int = 100
    log_interval: int = 10
    save_interval: int = 500
    keep: int = 3
    on_save_error: Literal["continue", "stop"] = "continue"
    profile: int = 0
    wandb: str | None = None


@dataclass(frozen=True)
class TrainConfig(LoopConfig, Hyperparameters):
    """One training run with one optimizer.

    Attributes:
      optimizer: a name in `optimizers.OPTIMIZERS`.
    """

    optimizer: str = "sophia_g"


@dataclass(frozen=True)
class CompareConfig(LoopConfig):
    """The same run once for each optimizer, on the same batches.

    Attributes:
      optimizers: names in `optimizers.OPTIMIZERS`.
      half: those of them that also take half of the steps, with a schedule of that length, as the
        run NAME_half.
    """

    optimizers: tuple[str, ...] = ("adamw", "sophia_g", "sophia_h", "sophia_g_eigenbasis")
    half: tuple[str, ...] = ("sophia_g_eigenbasis",)


@dataclass(frozen=True)
class TuneConfig(RunConfig):
    """The same number of tries for each optimizer, each a short run.

    Attributes:
      optimizers: names in `optimizers.OPTIMIZERS` that have a grid.
      tries: for each optimizer.
      steps: of each try.
      seed: of the params and the batches; comparisons use others.
    """

    optimizers: tuple[str, ...] = ("adamw", "sophia_g", "sophia_h")
    tries: int = 16
    steps: int = 500
    seed: int = 1000


def lookup(table: dict[str, Any], name: str, kind: str) -> Any:
    """Returns `table[name]`, or tells the user which names there are."""
    if name not in table:
        raise UsageError(f"There is no {kind} {name!r}. Choose one of: {', '.join(table)}.")
    return table[name]


WHOLE = 2**31  # what JAX counts in ends here

# What a number has to be: the smallest value, whether that itself is allowed, the largest (not).
RANGES: dict[str, tuple[float, bool, float]] = {
    "layers": (1, True, WHOLE),
    "width": (1, True, WHOLE),
    "heads": (1, True, WHOLE),
    "context": (1, True, WHOLE),
    "dropout": (0, True, 1),
    "profile": (0, True, WHOLE),
    "tries": (1, True, WHOLE),
    "steps": (1, True, WHOLE),
    "batch_size": (1, True, WHOLE),
    "batch_per_chip": (1, True, WHOLE),
    "accumulate": (1, True, WHOLE),
    "curvature_batch": (1, True, WHOLE),
    "curvature_share": (1, True, WHOLE),
    "eval_interval": (1, True, WHOLE),
    "eval_batches": (1, True, WHOLE),
    "log_interval": (1, True, WHOLE),
    "save_interval": (1, True, WHOLE),
    "update_interval": (1, True, WHOLE),
    "basis_interval": (1, True, WHOLE),
    "keep": (1, True, WHOLE),
    "hosts.processes": (1, True, WHOLE),
    "hosts.process": (0, True, WHOLE),
    "hosts.timeout": (1, True, WHOLE // 1000),  # in milliseconds as well
    "seed": (0, True, WHOLE),
    "tokens": (1, True, WHOLE),
    "temperature": (1e-6, True, math.inf),
    "learning_rate": (0, False, math.inf),
    "clip_norm": (0, False, math.inf),
    "gamma": (0, False, math.inf),
    "weight_decay": (0, True, math.inf),
    "b1": (0, True, 1),
    "b2": (0, True, 1),
    "win_rate": (0, False, 1),
    "warmup": (0, True, 1),
}

# Flags that take several values, or text, and at least one.
NOT_EMPTY = ("optimizers", "optimizer", "prompt")


def check(config: Any) -> None:
    """Tells the user of a number that is out of range, and of a flag that is left empty."""
    for name, (low, closed, high) in RANGES.items():
        owner, _, field_name = name.rpartition(".")
        value = getattr(getattr(config, owner, None) if owner else config, field_name, None)
        if value is None or low < value < high or (closed and value == low):
            continue
        bound = f"{'at least' if closed else 'more than'} {low}"
        bound += " and finite" if high == math.inf else f" and less than {high}"
        raise UsageError(f"{flag(name)} is {value}. It has to be {bound}.")
    for name in NOT_EMPTY:
        if getattr(config, name, None) in ((), ""):
            raise UsageError(f"{flag(name)} is empty. Give it a value.")


def flag(name: str) -> str:
    """How a setting is written on the command line."""
    return "--" + name.replace("_", "-")


def for_optimizer(config: CompareConfig | TuneConfig, optimizer: str) -> TrainConfig:
    """One of the runs that a comparison or a search is made of."""
    names = {f.name for f in dataclasses.fields(TrainConfig)}
    shared = {name: value for name, value in vars(config).items() if name in names}
    return TrainConfig(**shared, optimizer=optimizer)


def compared(config: CompareConfig) -> dict[str, TrainConfig]:
    """The runs of a comparison by their names.

    Raises:
      UsageError: `half` names an optimizer that is not among `optimizers`.
    """
    strangers = [name for name in config.half if name not in config.optimizers]
    if strangers and config.half != CompareConfig.half:
        raise UsageError(
            f"--half names {strangers[0]!r}, which is not compared. "
            f"Choose among --optimizers: {', '.join(config.optimizers)}."
        )
    runs = {name: for_optimizer(config, name) for name in config.optimizers}
    for name in config.optimizers:
        if name in config.half and config.steps > 1:
            runs[f"{name}_half"] = dataclasses.replace(runs[name], steps=config.steps // 2)
    return runs


def model_of(config: RunConfig) -> ModelConfig:
    """The model that `--model` names, with the sizes that were given."""
    preset = lookup(MODELS, config.model, "model")
    names = ("layers", "width", "heads", "context")
    sizes = {name: getattr(config, name) for name in names if getattr(config, name) is not None}
    model = dataclasses.replace(preset, **sizes)
    if model.width % model.heads:
        raise UsageError(
            f"--heads {model.heads} does not divide --width {model.width}. Choose a divisor."
        )
    scale = preset.init_scale * (preset.width / model.width) ** 0.5
    return dataclasses.replace(model, init_scale=scale)
