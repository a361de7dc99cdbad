"""Text from a trained model."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console

from examples.lm import data, run_folder, tokenizers
from examples.lm.checkpoint import Checkpoints
from examples.lm.config import Hyperparameters, RunConfig, TrainConfig, UsageError
from examples.lm.run import resolve
from examples.lm.train import Trainer


@dataclass(frozen=True)
class GenerateConfig:
    """A sample from a run's newest checkpoint.

    Attributes:
      out: the run's folder.
      prompt: what the text begins with.
      tokens: how many tokens to add.
      temperature: 1 samples from the model; towards 0 takes ever likelier tokens.
      seed: of the sample.
    """

    out: str
    prompt: str = "def "
    tokens: int = 200
    temperature: float = 0.8
    seed: int = 0


def run_config(out: str) -> TrainConfig:
    """The settings that a run's folder says it was trained with."""
    known = {*RunConfig.__dataclass_fields__, *Hyperparameters.__dataclass_fields__, "optimizer"}
    written = run_folder.read_json(run_folder.existing(out) / run_folder.RECORD)
    return TrainConfig(**{k: v for k, v in written.items() if k in known}, out=out)


def sample(trainer: Trainer, params: jax.Array, prompt: list[int], config: GenerateConfig) -> list:
    """The prompt and what follows it; the model sees the last `context` tokens."""
    context = trainer.run.model.context

    @jax.jit
    def next_token(window: jax.Array, last: jax.Array, key: jax.Array) -> jax.Array:
        logits_V = trainer.logits(params, window[None])[0, last]
        return jax.random.categorical(key, logits_V / config.temperature)

    tokens = list(prompt)
    keys = jax.random.split(jax.random.key(config.seed), config.tokens)
    for key in keys:
        seen = tokens[-context:]
        window = np.zeros(context, np.int32)
        window[: len(seen)] = seen
        tokens.append(int(next_token(jnp.asarray(window), len(seen) - 1, key)))
    return tokens


def generate(config: GenerateConfig) -> None:
    """Prints the sample."""
    if config.temperature <= 0 or config.tokens < 1 or not config.prompt:
        raise UsageError("--temperature and --tokens have to be positive, and --prompt not empty.")
    run = run_config(config.out)
    if run.data.startswith("bin:"):
        raise UsageError("A run on token files does not know their tokenizer; nothing to print.")
    folder = run_folder.existing(config.out)
    codec = tokenizers.find(
        run.tokenizer,
        lambda: data.texts_of(run.data)["train"],  # of a run that kept no tokenizer
        folder / run_folder.TOKENIZER,
    )
    trainer = Trainer(resolve(run, devices=jax.devices()[:1]).with_vocabulary(codec.size))
    store = Checkpoints(folder, run, read_only=True)
    restored = store.restore(trainer.abstract_sharded_state())
    if restored is None:
        raise UsageError(f"{config.out} holds no checkpoint yet. Wait for the run's first one.")
    state = restored[1]
    prompt = [int(token) for token in codec.encode(config.prompt.encode())]
    Console(markup=False, highlight=False).print(
        codec.decode(sample(trainer, state.params, prompt, config))
    )
