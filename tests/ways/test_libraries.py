"""Ways of running through other libraries: Trainer, pipeline, peft, accelerate, torchao."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import reattend

from .ways import AS_WRITTEN, POLICY, WORKS, equal, llama, numbers, optimised, ran, stack, tokens, way

slow = pytest.mark.slow
quiet = pytest.mark.filterwarnings("ignore")


@pytest.fixture(autouse=True)
def no_state() -> None:
    """accelerate keeps the precision of a process's first trainer for all that follow."""
    state = pytest.importorskip("accelerate.state")
    state.AcceleratorState._reset_state(True)


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(input_ids=tokens(2, 12)).logits
    return found


def trained(model: Any, folder: Path, **options: Any) -> float:
    """The loss of four steps of transformers' Trainer."""
    import transformers

    rows = [{"input_ids": row, "labels": row} for row in tokens(8, 16)]
    given = transformers.TrainingArguments(
        output_dir=str(folder), max_steps=4, per_device_train_batch_size=2, report_to=[], use_cpu=True, save_strategy="no",
        logging_strategy="no", disable_tqdm=True, seed=0, learning_rate=1e-3, **options,
    )
    trainer = transformers.Trainer(model=model, args=given, train_dataset=rows)
    return float(trainer.train().training_loss)


@quiet
@way("transformers' Trainer, with and without gradient checkpointing, under bf16", WORKS, slow)
@pytest.mark.parametrize("options", [{}, {"gradient_checkpointing": True}, {"bf16": True}], ids=str)
def test_trainer(options: dict[str, Any], tmp_path: Path) -> None:
    model = llama()
    ours = optimised(model)
    losses = [trained(m, tmp_path, **options) for m in (ours, model)]
    assert losses[0] == pytest.approx(losses[1], rel=2e-2 if options.get("bf16") else 1e-4)
    moved = [p for p in ours.parameters() if p.requires_grad]
    for a, b in zip(moved, model.parameters()):
        assert (a - b).abs().max() <= (5e-2 if options.get("bf16") else 2e-3) * b.abs().max()
    assert ran(ours)


@quiet
@way("transformers' pipeline", WORKS, slow)
def test_pipeline() -> None:
    import transformers

    config: Any = transformers.BertConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48, vocab_size=64, num_labels=3
    )
    torch.manual_seed(0)
    model = transformers.BertForSequenceClassification(config).eval()

    class Numbers:
        """A tokenizer's part in a pipeline: text into numbers."""

        def __call__(self, text: str, **_: Any) -> Any:
            row = torch.tensor([[ord(c) % 60 + 3 for c in text]])
            return transformers.BatchEncoding({"input_ids": row, "attention_mask": torch.ones_like(row)})

    class Classify(transformers.Pipeline):  # type: ignore[misc]
        def _sanitize_parameters(self, **_: Any) -> tuple[dict[str, Any], ...]:
            return {}, {}, {}

        def preprocess(self, text: Any, **_: Any) -> Any:
            return Numbers()(text)

        def _forward(self, given: Any, **_: Any) -> Any:
            return self.model(**given)

        def postprocess(self, found: Any, **_: Any) -> Any:
            return found.logits

    ours = optimised(model)
    said = ["a short text", "another text that is longer"]
    for got, want in zip(*(Classify(model=m, device=torch.device("cpu"))(said) for m in (ours, model))):
        equal(got, want)
    assert ran(ours)


# --- adapters -----------------------------------------------------------------------------------------------------------


def adapted(model: Any) -> Any:
    """The model with low-rank adapters that are not 0."""
    peft = pytest.importorskip("peft")
    made = peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], lora_dropout=0.0))
    for name, p in made.named_parameters():
        if "lora_" in name:
            nn.init.normal_(p, std=0.1, generator=torch.Generator().manual_seed(len(name)))
    return made.eval()


@quiet
@way("peft: adapters put in, then optimised; merged afterwards", WORKS, slow)
def test_adapters_before() -> None:
    model = adapted(llama())
    ours = reattend.optimize(copy.deepcopy(model), policy=POLICY)
    equal(logits(ours), logits(model))
    assert ran(ours)
    count = ran(ours)
    merged = ours.merge_and_unload()
    equal(logits(merged), logits(model), 1e-4)
    assert ran(ours) >= count


@quiet
@way("peft: optimised, then adapters put in", WORKS, slow)
def test_adapters_afterwards() -> None:
    ours = optimised(llama())
    logits(ours)
    count = ran(ours)
    equal(logits(adapted(ours)), logits(adapted(llama())))
    assert ran(ours) > count


@quiet
@way("peft: adapters that are trained", WORKS, slow)
def test_adapters_trained() -> None:
    model = adapted(llama()).train()
    ours = reattend.optimize(copy.deepcopy(model), policy=POLICY)
    for m in (ours, model):
        m(input_ids=tokens(2, 12), labels=tokens(2, 12)).loss.backward()
    for (name, a), b in zip(ours.named_parameters(), model.parameters()):
        assert (a.grad is None) == (b.grad is None), name
        if a.grad is not None and b.grad is not None:
            assert (a.grad - b.grad).abs().max() <= 1e-4 * b.grad.abs().max(), name
    assert ran(ours)


# --- where weights lie ----------------------------------------------------------------------------------------------------


@quiet
@way("accelerate: weights offloaded to a folder", WORKS, slow)
def test_offloaded(tmp_path: Path) -> None:
    accelerate = pytest.importorskip("accelerate")
    model = llama()
    ours = accelerate.disk_offload(copy.deepcopy(model), str(tmp_path), execution_device=torch.device("cpu"))
    reattend.optimize(ours, policy=POLICY)
    for _ in range(2):
        equal(logits(ours), logits(model))
    # its hooks, which fetch the weights, break the graph behind each attention: what was computed so far is its output, too
    assert "graph break" in str(reattend.report(ours))
    assert ran(ours)


@quiet
@way("accelerate's `Accelerator.prepare`", WORKS, slow)
def test_prepared() -> None:
    accelerate = pytest.importorskip("accelerate")
    model = stack()
    ours = optimised(model)
    prepared = accelerate.Accelerator(cpu=True).prepare(ours)
    with torch.no_grad():
        equal(prepared(numbers(2, 24, 32)), model(numbers(2, 24, 32)))
    assert ran(ours)


@quiet
@way("torchao: int8 weights", AS_WRITTEN, slow)
def test_torchao() -> None:
    ao = pytest.importorskip("torchao.quantization")
    model = llama()
    ao.quantize_(model, ao.Int8WeightOnlyConfig())
    ours = optimised(model)
    equal(logits(ours), logits(model))
    assert "could not be captured" in str(reattend.report(ours))
