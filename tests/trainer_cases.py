"""A tiny BERT in Hugging Face's Trainer, in one process or on the ranks of a pool."""

from __future__ import annotations

from contextlib import contextmanager

import torch
import torch.distributed as dist
import torch.nn.functional as F
from launched import launched
from torch import nn

from frog_triton import FROG

STEPS = 6


def sentences(count=96):
    """Six of 16 tokens; the label says in which half the first one lies."""
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(0, 16, (count, 6), generator=generator)
    labels = (tokens[:, 0] < 8).long()
    return [{"input_ids": t, "labels": y} for t, y in zip(tokens, labels, strict=True)]


def bert():
    from transformers import BertConfig, BertForSequenceClassification

    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "vocab_size": 16}
    config = BertConfig(
        num_hidden_layers=2,
        num_attention_heads=2,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        **sizes,
    )
    return BertForSequenceClassification(config).double()


def trainer(folder, model, optimizer=None, kind=None, **arguments):
    """A Trainer of `model`, or of what `model` makes if it is no module.

    Args:
        folder: for checkpoints.
        model: to be trained.
        optimizer: for `optimizer_cls_and_kwargs`; None: the factory with all samples.
        kind: of Trainer.
        arguments: beside the ones here.
    """
    from transformers import Trainer, TrainingArguments

    usual = {
        "max_steps": STEPS,
        "per_device_train_batch_size": 8,
        "lr_scheduler_type": "cosine",
        "warmup_steps": 2,
        "report_to": "none",
        "save_strategy": "no",
        "logging_steps": 1,
        "disable_tqdm": True,
        "use_cpu": True,
    }
    models = {"model" if isinstance(model, nn.Module) else "model_init": model}
    made = (kind or Trainer)(
        args=TrainingArguments(str(folder), **usual | arguments),
        train_dataset=sentences(),
        optimizer_cls_and_kwargs=optimizer or (lambda: FROG, {"sample_size": 10_000}),
        **models,
    )
    made.model_accepts_loss_kwargs = False  # its loss is the mean over any batch
    return made


def trained(folder, **arguments):
    """Weights after a training."""
    model = bert()
    trainer(folder, model, **arguments).train()
    return {name: p.detach().clone() for name, p in model.named_parameters()}


@contextmanager
def accelerating():
    """On a pool's rank: Accelerate looks anew for what launched it."""
    from accelerate.state import AcceleratorState

    with launched():
        AcceleratorState._reset_state(reset_partial_state=True)
        try:
            yield
        finally:
            AcceleratorState._reset_state(reset_partial_state=True)


def trained_on_ranks(folder, **arguments):
    with accelerating():
        return trained(folder, **arguments)


def net():
    torch.manual_seed(0)
    layers = (nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 2))
    return nn.Sequential(*layers).double()


def loop(accelerator, model, opt, batches):
    """Accelerate's plain loop."""
    for x, y in batches:
        with accelerator.accumulate(model):
            accelerator.backward(F.cross_entropy(model(x), y))
            if accelerator.sync_gradients:
                accelerator.clip_grad_norm_(model.parameters(), 10.0)
            opt.step()
            opt.zero_grad()


def batches(parts, count=4):
    """The same numbers, each batch in so many parts."""
    generator = torch.Generator().manual_seed(0)
    for _ in range(count):
        x = torch.randn(8, 4, generator=generator, dtype=torch.float64)
        y = (x[:, 0] > 0).long()
        yield list(zip(x.chunk(parts), y.chunk(parts), strict=True))


def accelerated(accumulate=1, **options):
    """Weights after Accelerate's loop, each rank with its part of every batch."""
    from accelerate import Accelerator

    size, rank = (dist.get_world_size(), dist.get_rank()) if _many() else (1, 0)
    model = net()
    accelerator = Accelerator(
        cpu=True, gradient_accumulation_steps=accumulate, **options
    )
    model, opt = accelerator.prepare(model, FROG(model, sample_size=10_000))
    parts = [batch[rank::size] for batch in batches(size * accumulate)]
    loop(accelerator, model, opt, [pair for batch in parts for pair in batch])
    return {n.removeprefix("module."): p.detach() for n, p in model.named_parameters()}


def _many():
    return dist.is_initialized()


def accelerated_on_ranks(accumulate):
    with accelerating():
        return accelerated(accumulate)


def shard_by_accelerate(accelerator):
    """Turn FSDP2 on, which Accelerate refuses on a CPU."""
    from accelerate import FullyShardedDataParallelPlugin
    from accelerate.utils import DistributedType

    accelerator.state.distributed_type = DistributedType.FSDP
    accelerator.state.fsdp_plugin = FullyShardedDataParallelPlugin(fsdp_version=2)


def sharded_by_accelerate(late):
    """Weights after Accelerate's loop with FSDP2, or the error.

    Args:
        late: build FROG after the model was sharded, not before.
    """
    from accelerate import Accelerator

    with accelerating():
        accelerator = Accelerator(cpu=True)
        shard_by_accelerate(accelerator)
        model = net()
        if late:
            placeholder = torch.optim.SGD(model.parameters())
            model, _ = accelerator.prepare(model, placeholder)
            opt = accelerator.prepare(FROG(model, sample_size=10_000))
        else:
            model, opt = accelerator.prepare(model, FROG(model))
        before = [p.full_tensor() for p in model.parameters()]
        rank, size = dist.get_rank(), dist.get_world_size()
        mine = [batch[rank] for batch in batches(size)]
        try:
            loop(accelerator, model, opt, mine)
        except RuntimeError as error:
            after = [p.full_tensor() for p in model.parameters()]
            return str(error), all(map(torch.equal, before, after))
        return {n: p.full_tensor().detach() for n, p in model.named_parameters()}


def sharded_by_trainer(folder, late):
    """Weights after the Trainer with FSDP2, and whether a resume ends alike.

    Args:
        folder: for checkpoints.
        late: build FROG after the model was sharded, not before; else an error.
    """
    from transformers import Trainer

    class Sharded(Trainer):
        def create_accelerator_and_postprocess(self):
            super().create_accelerator_and_postprocess()
            shard_by_accelerate(self.accelerator)
            self.is_fsdp_enabled = True

    class FROGTrainer(Sharded):
        """With the lines that users are told to write."""

        def create_scheduler(self, num_training_steps, optimizer=None):
            frog = FROG(self.model, sample_size=10_000)  # sharded by now
            self.optimizer = self.accelerator.prepare(frog)
            return super().create_scheduler(num_training_steps, self.optimizer)

    def run(checkpoint=None):
        how = {"kind": FROGTrainer, "optimizer": (torch.optim.SGD, {"lr": 1.0})}
        saving = {"save_strategy": "steps", "save_steps": 3}
        made = trainer(folder, bert(), **(how if late else {"kind": Sharded}), **saving)
        try:
            made.train(resume_from_checkpoint=checkpoint)
        except RuntimeError as error:
            return str(error)
        named = made.model.named_parameters()
        return {name: p.full_tensor().detach() for name, p in named}

    with accelerating():
        weights = run()
        if not late:
            return weights
        resumed = run(f"{folder}/checkpoint-3")
        return weights, all(torch.equal(resumed[n], weights[n]) for n in weights)
