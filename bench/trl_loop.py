"""TRL's GRPOTrainer on the problems of `bench loop`, set up to be as fast as it can be there.

No gradient checkpointing, no reference model, no logging or saving, the whole step in one
micro-batch, its own fused head, SDPA attention, one generation a step.
"""

from __future__ import annotations

import contextlib
import importlib
import io
import tempfile
from collections.abc import Callable, Sequence
from typing import Any

from rollfuse.bench.race import Clock, Race, Run
from rollfuse.rollout.tasks import Problem


def train(
    model: Any,
    tokenizer: Any,
    batches: Sequence[Sequence[Problem]],
    race: Race,
    accuracy: Callable[[Any], float],
) -> Run:
    """Train `model` in place on `batches`, one optimiser step each.

    Args:
        model: a transformers causal LM; tokenizer: its PreTrainedTokenizerFast, with an end token.
        accuracy: model -> held-out exact match; called off the clock.
    """
    trl = importlib.import_module("trl")
    datasets = importlib.import_module("datasets")
    transformers = importlib.import_module("transformers")
    clock = Clock()
    run = Run("trl", clock, race.seed)
    problems = [problem for batch in batches for problem in batch]
    rows = [{"prompt": p.prompt, "answer": p.answer} for p in problems]

    class Points(transformers.TrainerCallback):  # type: ignore[misc, name-defined]
        """Measures accuracy between steps, with the clock stopped."""

        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            run.finish_step(state.global_step, race, lambda: accuracy(model))

    with tempfile.TemporaryDirectory() as folder:
        trainer = _timed(trl.GRPOTrainer, clock)(
            model=model,
            reward_funcs=_reward(tokenizer, race, run),
            args=_config(trl, race, folder),
            train_dataset=datasets.Dataset.from_list(rows),
            processing_class=tokenizer,
            callbacks=[Points()],
        )
        trainer.time_backward()
        run.start(model, lambda: accuracy(model))
        with contextlib.redirect_stdout(io.StringIO()):  # it prints its metrics at the end
            trainer.train()
    return run


def _config(trl: Any, race: Race, folder: str) -> Any:
    return trl.GRPOConfig(
        output_dir=folder,
        max_steps=race.steps,
        per_device_train_batch_size=race.prompts * race.samples,
        gradient_accumulation_steps=1,
        num_generations=race.samples,
        max_completion_length=race.task.max_new_tokens,
        shuffle_dataset=False,
        learning_rate=race.learning_rate,
        lr_scheduler_type="constant",
        weight_decay=0.0,
        max_grad_norm=race.max_grad_norm,
        loss_type="grpo",  # mean over sequences of the mean over tokens
        scale_rewards="group",
        epsilon=race.clip,
        beta=0.0,
        temperature=1.0,
        top_p=1.0,
        top_k=0,
        num_iterations=1,
        gradient_checkpointing=False,
        bf16=False,
        use_cpu=True,
        use_vllm=False,
        use_liger_kernel=False,
        seed=race.seed,
        report_to="none",
        logging_strategy="no",
        save_strategy="no",
        eval_strategy="no",
        disable_tqdm=True,
        dataloader_pin_memory=False,
    )


def _reward(tokenizer: Any, race: Race, run: Run) -> Callable[..., list[float]]:
    """Reward 1 for the exact answer and the end token, counted as it is given."""
    end = tokenizer.eos_token_id

    def exact(
        prompts: list[str], completion_ids: list[list[int]], answer: list[str], **_: object
    ) -> list[float]:
        rewards = []
        for prompt, ids, wanted in zip(prompts, completion_ids, answer, strict=True):
            finished = bool(ids) and ids[-1] == end
            text = "".join(tokenizer.convert_ids_to_tokens(ids[:-1] if finished else ids))
            rewards.append(race.task.grade(Problem(prompt, wanted), text, finished))
        run.count(prompts, rewards, race.samples)
        return rewards

    return exact


def _timed(trainer_class: Any, clock: Clock) -> Any:
    """The trainer with its generation, loss and backward on the clock, otherwise untouched."""

    class Timed(trainer_class):  # type: ignore[misc]
        def _generate_single_turn(self, *args: Any, **kwargs: Any) -> Any:
            with clock.phase("generation"):
                return super()._generate_single_turn(*args, **kwargs)

        def _compute_loss(self, *args: Any, **kwargs: Any) -> Any:
            with clock.phase("loss forward"):
                return super()._compute_loss(*args, **kwargs)

        def time_backward(self) -> None:
            self.accelerator.backward = clock.timing("backward", self.accelerator.backward)

    return Timed
