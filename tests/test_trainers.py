"""FROG in Hugging Face's Trainer and in Accelerate's loop, alone and on two ranks."""

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("accelerate")

import trainer_cases as cases

from frog_triton import FROG


def worst(weights, others):
    """The largest relative difference of a parameter."""
    assert weights.keys() == others.keys()
    return max(
        ((weights[n] - others[n]).norm() / others[n].norm()).item() for n in weights
    )


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    """Weights after batches of 16 in one go."""
    folder = tmp_path_factory.mktemp("reference")
    return cases.trained(folder, per_device_train_batch_size=16)


@pytest.mark.parametrize(
    "arguments",
    [
        {"gradient_accumulation_steps": 2},
        {"per_device_train_batch_size": 16, "activation_checkpointing": True},
    ],
)
def test_parts_of_a_batch_and_checkpointing_change_nothing(
    tmp_path, reference, arguments
):
    weights = cases.trained(tmp_path, **arguments)
    assert worst(weights, reference) < 1e-9  # measured 1.1e-11


def test_two_ranks_step_as_one(pools, tmp_path, reference):
    first, second = pools[2].run(cases.trained_on_ranks, str(tmp_path))
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert worst(first, reference) < 1e-9  # measured 1.1e-11


def test_shards_step_as_one(pools, tmp_path, reference):
    for weights, resumed in pools[2].run(cases.sharded_by_trainer, str(tmp_path), True):
        assert worst(weights, reference) < 1e-9  # measured 1.1e-11
        assert resumed
    for message in pools[2].run(cases.sharded_by_trainer, str(tmp_path), False):
        assert "Accelerate's FSDP2 does so in prepare: build FROG after it" in message


def test_resume_is_bit_for_bit(tmp_path):
    optimizer = (lambda: FROG, {"lr": 0.01, "sample_size": 8})
    saving = {"save_strategy": "steps", "save_steps": 3, "optimizer": optimizer}
    expected = cases.trained(tmp_path, **saving)
    model = cases.bert()
    resumed = cases.trainer(tmp_path, model, **saving)
    resumed.train(resume_from_checkpoint=f"{tmp_path}/checkpoint-3")
    for name, p in model.named_parameters():
        assert torch.equal(p, expected[name])


@pytest.mark.parametrize(
    ("kind", "rates"),
    [
        ("linear", [0, 0.5, 1, 0.75, 0.5, 0.25]),
        ("constant_with_warmup", [0, 0.5, 1, 1, 1, 1]),
    ],
)
def test_schedules_of_the_arguments(tmp_path, kind, rates):
    """They scale both groups; rates are the optimizer's, not `learning_rate`."""
    optimizer = (lambda: FROG, {"lr": 0.02, "fallback_lr": 1e-3})
    trainer = cases.trainer(
        tmp_path, cases.bert(), optimizer, lr_scheduler_type=kind, learning_rate=7.0
    )
    trainer.train()
    logged = [h["learning_rate"] for h in trainer.state.log_history if "loss" in h]
    assert logged == pytest.approx([0.02 * rate for rate in rates])
    first, rest = trainer.optimizer.param_groups
    assert first["lr"] == pytest.approx(20 * rest["lr"])


def test_a_model_that_the_trainer_makes(tmp_path):
    """`model_init` makes another model, and the factory another FROG, in each run."""
    trainer = cases.trainer(tmp_path, cases.bert, max_steps=2)
    runs = []
    for _ in range(2):
        trainer.train()
        assert trainer.optimizer.optimizer.describe().updated_by("frog")
        runs.append([p.detach().clone() for p in trainer.model.parameters()])
    assert all(map(torch.equal, *runs))


def test_the_class_itself(tmp_path):
    """The model goes with it, which any version of transformers passes on."""
    optimizer = (FROG, {"lr": 0.02})
    with pytest.raises(TypeError, match=r"lambda: FROG.*\(FROG, {'model': model"):
        cases.trainer(tmp_path, cases.bert(), optimizer).train()
    model = cases.bert()
    optimizer = (FROG, {"model": model, "sample_size": 10_000})
    arguments = {"per_device_train_batch_size": 16, "optimizer": optimizer}
    cases.trainer(tmp_path, model, **arguments).train()
    assert (
        worst(
            dict(model.named_parameters()),
            cases.trained(tmp_path, per_device_train_batch_size=16),
        )
        == 0
    )


def test_lora_in_bfloat16(tmp_path):
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=2, target_modules=["query"], task_type="SEQ_CLS")
    model = peft.get_peft_model(cases.bert().float(), config)
    trainer = cases.trainer(tmp_path, model, bf16=True)
    trainer.train()
    opt = trainer.optimizer.optimizer  # inside of Accelerate's
    served = set(opt.describe().updated_by("frog"))
    trained = {n for n, p in model.named_parameters() if opt.state.get(p)}
    assert trained == {n for n, p in model.named_parameters() if p.requires_grad}
    assert len(served & trained) == 4 and all("lora_" in n for n in served & trained)


def test_accelerate_alone_accumulates():
    whole, parts = cases.accelerated(), cases.accelerated(accumulate=2)
    assert worst(parts, whole) < 1e-12  # measured 2.5e-15


@pytest.mark.parametrize("accumulate", [1, 2])
def test_accelerate_on_two_ranks(pools, accumulate):
    whole = cases.accelerated()
    for weights in pools[2].run(cases.accelerated_on_ranks, accumulate):
        assert worst(weights, whole) < 1e-12  # measured 3.5e-15


def test_accelerate_shards_before_frog_is_built(pools):
    for weights in pools[2].run(cases.sharded_by_accelerate, True):
        assert worst(weights, cases.accelerated()) < 1e-12  # measured 2.5e-15
    for message, unchanged in pools[2].run(cases.sharded_by_accelerate, False):
        assert "Accelerate's FSDP2 does so in prepare: build FROG after it" in message
        assert unchanged
