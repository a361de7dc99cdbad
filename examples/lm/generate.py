"""Text from a trained model."""

import contextlib
import dataclasses
from dataclasses import dataclass
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console

from . import data, memory, record, run_folder, tokenizers
from .checkpoint import Checkpoints
from .config import CompareConfig, MeshConfig, TrainConfig, UsageError, compared
from .run import resolve
from .train import Trainer


@dataclass(frozen=True)
class GenerateConfig:
    """A sample from a run's newest checkpoint.

    Attributes:
      out: the run's folder.
      run: in the folder of a comparison, the optimizer whose model is sampled.
      prompt: what the text begins with.
      tokens: how many tokens to add.
      temperature: 1 samples from the model; towards 0 takes ever likelier tokens.
      seed: of the sample.
    """

    out: str
    run: str | None = None
    prompt: str = "def "
    tokens: int = 200
    temperature: float = 0.8
    seed: int = 0


def sample(
    trainer: Trainer, params: jax.Array, prompt: list[int], size: int, config: GenerateConfig
) -> list[int]:
    """The prompt and what follows it; the model sees the last `context` tokens.

    A model may have more tokens than the tokenizer's `size`. Those are never drawn.
    """
    context = trainer.run.model.context

    @jax.jit
    def next_token(window: jax.Array, last: jax.Array, key: jax.Array) -> jax.Array:
        logits_V = trainer.logits(params, window[None])[0, last, :size]
        return jax.random.categorical(key, logits_V / config.temperature)

    tokens = list(prompt)
    keys = jax.random.split(jax.random.key(config.seed), config.tokens)
    for key in keys:
        seen = tokens[-context:]
        window = np.zeros(context, np.int32)
        window[: len(seen)] = seen
        tokens.append(int(next_token(jnp.asarray(window), len(seen) - 1, key)))
    return tokens


def text_after(
    prompt: bytes, run: TrainConfig, codec: tokenizers.Codec, config: GenerateConfig, name: str = ""
) -> str | None:
    """A prompt and what the run's newest checkpoint continues it with; None without a checkpoint.

    Args:
      prompt: what the text begins with.
      run: the settings that the model was trained with.
      codec: the tokenizer that it was trained with.
      config: the folder, and how to sample.
      name: the run's among several in the folder.
    """
    run = dataclasses.replace(run, mesh=MeshConfig(), accumulate=1)
    trainer = Trainer(resolve(run, devices=jax.devices()[:1]).with_vocabulary(codec.size))
    store = Checkpoints(Path(config.out), run, read_only=True, run=name)
    with memory.enough(trainer, memory.SAMPLING):
        with contextlib.closing(store):
            restored = store.restore(trainer.abstract_sharded_state())
        if restored is None:
            return None
        tokens = [int(token) for token in codec.encode(prompt)]
        tokens = sample(trainer, restored[1].params, tokens, codec.size, config)
    return printable(codec.decode(tokens))


def printable(text: str) -> str:
    """The text without control characters, which a terminal would obey."""
    text = text.replace("\r\n", "\n")
    return "".join(c if c.isprintable() or c in "\n\t" else "\ufffd" for c in text)


def trained(config: GenerateConfig) -> tuple[TrainConfig, str]:
    """The run to sample from, and its name where the folder holds several.

    Raises:
      UsageError: there is none, or it has to be named.
    """
    made_by = record.command_of(record.read(run_folder.existing(config.out, "sample from")))
    if made_by == "tune":
        raise UsageError(
            f"{config.out} was made by `tune`, which keeps no model. Train one with the command "
            "that the search printed at its end, and name its folder."
        )
    if made_by == "train":
        run = record.stored(TrainConfig, config.out)
        if config.run not in (None, run.optimizer):
            raise UsageError(
                f"{config.out} holds one run, of {run.optimizer}. Leave out --run {config.run}."
            )
        return run, ""
    runs = compared(record.stored(CompareConfig, config.out))
    alone = len(runs) == 1
    name = next(iter(runs)) if alone and config.run is None else config.run
    if name not in runs:
        raise UsageError(
            f"{config.out} holds the runs {', '.join(runs)}. Choose one with --run NAME."
        )
    return runs[name], "" if alone else name


def generate(config: GenerateConfig) -> None:
    """Prints the sample."""
    run, name = trained(config)
    kept = Path(config.out) / run_folder.TOKENIZER
    kind, _, place = run.data.partition(":")
    if kind == "bin":
        codec = tokenizers.of_token_files(Path(place), kept)
    else:
        codec = tokenizers.find(
            run.tokenizer,
            lambda: data.texts_of(run.data)["train"],  # of a run that kept no tokenizer
            kept,
        )
    if codec is None:
        raise UsageError(
            f"{run.data} had no meta.pkl when the run began, so that its tokens cannot be printed."
        )
    # Python hides bytes of the command line that are no UTF-8 in surrogates.
    prompt = config.prompt.encode(errors="surrogateescape")
    text = text_after(prompt, run, codec, config, name)
    if text is None:
        of_run = f" of {name}" if name else ""
        raise UsageError(
            f"{config.out} holds no checkpoint{of_run} yet. Wait for the run's first one."
        )
    Console(markup=False, highlight=False).print(text)
