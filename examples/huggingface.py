"""FROG in the Hugging Face Trainer: build it on the model, pass it with a schedule.

python examples/huggingface.py
"""

import tempfile

import torch
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    Trainer,
    TrainingArguments,
    get_cosine_schedule_with_warmup,
)

from frog_triton import FROG

STEPS = 80


def sentences(count: int) -> list[dict[str, torch.Tensor]]:
    """Eight of 32 tokens; the label says in which half the first one lies."""
    tokens = torch.randint(0, 32, (count, 8))
    labels = (tokens[:, 0] < 16).long()
    return [{"input_ids": t, "labels": y} for t, y in zip(tokens, labels, strict=True)]


def main() -> float:
    """Train a tiny BERT, stop, resume from the checkpoint; returns the eval loss."""
    torch.manual_seed(0)
    train, held_out = sentences(512), sentences(128)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "vocab_size": 32}
    config = BertConfig(num_hidden_layers=2, num_attention_heads=2, **sizes)

    def trainer(folder: str) -> Trainer:
        model = BertForSequenceClassification(config)
        optimizer = FROG(model, lr=5e-3, fallback="adamw", fallback_lr=5e-3)
        schedule = get_cosine_schedule_with_warmup(optimizer, 5, STEPS)
        arguments = {"per_device_train_batch_size": 32, "max_grad_norm": 1.0}
        arguments |= {"save_steps": STEPS // 2, "report_to": "none"}
        return Trainer(
            model,
            TrainingArguments(folder, max_steps=STEPS, **arguments),
            train_dataset=train,
            eval_dataset=held_out,
            optimizers=(optimizer, schedule),
        )

    with tempfile.TemporaryDirectory() as folder:
        trainer(folder).train()
        resumed = trainer(folder)
        resumed.train(resume_from_checkpoint=f"{folder}/checkpoint-{STEPS // 2}")
        return resumed.evaluate()["eval_loss"]


if __name__ == "__main__":
    print(f"held-out loss {main():.3f}")
