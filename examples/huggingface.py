"""FROG in the Hugging Face Trainer, with a schedule of its arguments.

python examples/huggingface.py
"""

import tempfile

import torch
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    Trainer,
    TrainingArguments,
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
        arguments = {"per_device_train_batch_size": 32, "max_grad_norm": 1.0}
        arguments |= {"lr_scheduler_type": "cosine", "warmup_steps": 5}
        arguments |= {"save_steps": STEPS // 2, "report_to": "none"}
        return Trainer(
            BertForSequenceClassification(config),
            TrainingArguments(folder, max_steps=STEPS, **arguments),
            train_dataset=train,
            eval_dataset=held_out,
            # What makes the optimizer of the model; the class itself would be given
            # parameters. Its rates count, not the arguments' learning_rate.
            optimizer_cls_and_kwargs=(lambda: FROG, {"lr": 5e-3, "fallback_lr": 5e-3}),
        )

    with tempfile.TemporaryDirectory() as folder:
        trainer(folder).train()
        resumed = trainer(folder)
        resumed.train(resume_from_checkpoint=f"{folder}/checkpoint-{STEPS // 2}")
        return resumed.evaluate()["eval_loss"]


if __name__ == "__main__":
    print(f"held-out loss {main():.3f}")
