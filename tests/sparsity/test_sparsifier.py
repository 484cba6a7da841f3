# Copyright 2026 The nt_transformers authors. Licensed under the Apache License, Version 2.0.
"""The sparsifier during training: what is masked, what stays exact, what each method changes, and clear errors."""

import hashlib
import math
import subprocess
import sys
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sparse_training import (
    METHODS,
    OPTIMIZERS,
    Bare,
    frozen_sgd,
    loss_of,
    make_batch,
    make_config,
    make_network,
    train_step,
)
from torch import nn
from torch.optim import SGD, Adam

from nt_transformers import NeuroTrailsLlamaConfig, NeuroTrailsLlamaForCausalLM
from nt_transformers.sparsity import Sparsifier, SparsityConfig, selection


def assert_exact(sparsifier: Sparsifier, nonzeros: int) -> None:
    """The masks have exactly that many entries, all figures agree, and every removed weight is zero."""
    masks = sparsifier.masks
    assert sum(int(mask.sum()) for mask in masks.values()) == nonzeros
    summary = sparsifier.summary()
    assert summary.nonzeros == nonzeros
    assert summary.density == sparsifier.density == nonzeros / summary.numel
    assert {name: tensor.nonzeros for name, tensor in summary.tensors.items()} == {
        name: int(mask.sum()) for name, mask in masks.items()
    }
    parameters = dict(sparsifier.model.named_parameters())
    assert all((parameters[name][~mask] == 0).all() for name, mask in masks.items())


@pytest.mark.parametrize("optimizer_name", OPTIMIZERS)
@pytest.mark.parametrize("method", METHODS)
def test_removed_weights_are_zero_and_counts_exact_after_every_step(method: str, optimizer_name: str) -> None:
    if method == "momentum" and optimizer_name in ("sgd", "adafactor"):
        pytest.skip("has no momentum")
    model = make_network()
    optimizer = OPTIMIZERS[optimizer_name](model.parameters())
    sparsifier = Sparsifier(model, optimizer, make_config(method), total_steps=12)
    before = {name: tensor.nonzeros for name, tensor in sparsifier.summary().tensors.items()}
    numel = sparsifier.summary().numel
    assert list(before) == ["0.weight", "2.weight", "5.weight", "7.weight"]
    assert_exact(sparsifier, numel if method == "gmp" else round(0.4 * numel))
    for step in range(12):
        train_step(model, optimizer, sparsifier, step)
        if method == "gmp":
            assert_exact(sparsifier, sparsifier.summary().nonzeros)
        else:
            assert_exact(sparsifier, sum(before.values()))
            assert {name: tensor.nonzeros for name, tensor in sparsifier.summary().tensors.items()} == before
    assert sparsifier.summary().nonzeros == round(0.4 * numel)


@pytest.mark.parametrize("method", ["rigl", "momentum"])
def test_work_in_pieces_changes_nothing(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def trained() -> dict[str, torch.Tensor]:
        model = make_network().to(memory_format=torch.channels_last)
        optimizer = OPTIMIZERS["adam"](model.parameters())
        sparsifier = Sparsifier(model, optimizer, make_config(method), total_steps=12)
        for step in range(12):
            train_step(model, optimizer, sparsifier, step)
        return model.state_dict()

    whole = trained()
    monkeypatch.setattr(selection, "_PIECE", 7)
    torch.testing.assert_close(trained(), whole, rtol=0, atol=0)


@settings(max_examples=40, deadline=None)
@given(
    shapes=st.lists(st.tuples(st.integers(1, 12), st.integers(1, 12)), min_size=1, max_size=4),
    density=st.floats(0.02, 1.0),
    drop_fraction=st.floats(0.001, 1.0),
    method=st.sampled_from(["rigl", "set", "gmp", "neurotrails_llm", "neurotrails_vision"]),
    distribution=st.sampled_from(["uniform", "erk"]),
    allow_regrow=st.booleans(),
)
def test_counts_are_exact_for_any_shapes_and_densities(
    shapes: list[tuple[int, int]], density: float, drop_fraction: float, method: str, **fields: Any
) -> None:
    model = Bare(*shapes)
    total = sum(math.prod(shape) for shape in shapes)
    nonzeros = round(density * total)
    config = make_config(method, density=density, drop_fraction=drop_fraction, update_interval=1, **fields)
    if nonzeros == 0:
        with pytest.raises(ValueError, match="density"):
            Sparsifier(model, frozen_sgd(model), config, total_steps=6)
        return
    sparsifier = Sparsifier(model, frozen_sgd(model), config, total_steps=6)
    for _ in range(6):
        model.draw_gradients()
        sparsifier.step()
        assert_exact(sparsifier, nonzeros if method != "gmp" else sparsifier.summary().nonzeros)
    assert sparsifier.summary().nonzeros == nonzeros


def test_each_tensor_follows_erk_and_tensors_at_density_one_are_left_alone() -> None:
    model = Bare((300, 300), (10, 1))
    sparsifier = Sparsifier(model, frozen_sgd(model), make_config("neurotrails_llm", density=0.1), total_steps=20)
    full = model.weights[1].detach().clone()
    for _ in range(20):
        model.draw_gradients()
        sparsifier.step()
    assert sparsifier.summary().tensors["weights.1"].density == 1
    assert torch.equal(model.weights[1], full)


def test_initial_masks_are_random_within_a_tensor() -> None:
    model = Bare((400, 400))
    mask = Sparsifier(model, frozen_sgd(model), make_config("rigl", density=0.3), total_steps=9).masks["weights.0"]
    per_row = mask.float().mean(dim=1)
    assert per_row.mean().item() == pytest.approx(0.3)
    assert per_row.std().item() == pytest.approx((0.3 * 0.7 / 400) ** 0.5, rel=0.2)


def test_dense_changes_nothing_bit_for_bit() -> None:
    with_sparsifier, without = make_network(), make_network()
    optimizers = [OPTIMIZERS["adam"](model.parameters()) for model in (with_sparsifier, without)]
    sparsifier = Sparsifier(with_sparsifier, optimizers[0], SparsityConfig(method="dense"), total_steps=6)
    for step in range(6):
        train_step(with_sparsifier, optimizers[0], sparsifier, step)
        train_step(without, optimizers[1], None, step)
    pairs = zip(with_sparsifier.parameters(), without.parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)
    assert sparsifier.density == sparsifier.explored == 1


def test_static_masks_never_change() -> None:
    model = make_network()
    optimizer = OPTIMIZERS["momentum"](model.parameters())
    sparsifier = Sparsifier(model, optimizer, make_config("static", update_interval=1), total_steps=8)
    masks = {name: mask.clone() for name, mask in sparsifier.masks.items()}
    for step in range(8):
        train_step(model, optimizer, sparsifier, step)
    assert all(torch.equal(mask, masks[name]) for name, mask in sparsifier.masks.items())
    assert sparsifier.explored == sparsifier.density


def test_masks_depend_on_the_seed_and_nothing_else() -> None:
    def masks(seed: int, global_seed: int) -> list[torch.Tensor]:
        model = make_network()
        torch.manual_seed(global_seed)
        optimizer = OPTIMIZERS["sgd"](model.parameters())
        sparsifier = Sparsifier(model, optimizer, make_config("set", seed=seed), total_steps=6)
        for step in range(4):
            torch.rand(global_seed)
            train_step(model, optimizer, sparsifier, step)
        return list(sparsifier.masks.values())

    same, other = masks(0, 1), masks(1, 1)
    assert all(torch.equal(a, b) for a, b in zip(same, masks(0, 7), strict=True))
    assert not any(torch.equal(a, b) for a, b in zip(same, other, strict=True))


def test_the_global_generators_are_left_alone() -> None:
    torch.manual_seed(3)
    state = torch.get_rng_state()
    model = Bare((20, 20), (1, 1))
    sparsifier = Sparsifier(model, frozen_sgd(model), make_config("neurotrails_llm"), total_steps=9)
    for _ in range(4):
        sparsifier.step()
    assert torch.equal(torch.get_rng_state(), state)


DIGEST = """
from sparse_training import Bare, frozen_sgd, make_config
from nt_transformers.sparsity import Sparsifier
import hashlib
model = Bare((30, 40))
sparsifier = Sparsifier(model, frozen_sgd(model), make_config("neurotrails_llm"), total_steps=9)
for _ in range(4):
    sparsifier.step()
print(hashlib.sha256(sparsifier.masks["weights.0"].numpy().tobytes()).hexdigest())
"""


@pytest.mark.slow
def test_two_processes_agree(request: pytest.FixtureRequest) -> None:
    model = Bare((30, 40))
    sparsifier = Sparsifier(model, frozen_sgd(model), make_config("neurotrails_llm"), total_steps=9)
    for _ in range(4):
        sparsifier.step()
    here = hashlib.sha256(sparsifier.masks["weights.0"].numpy().tobytes()).hexdigest()
    there = subprocess.run(
        [sys.executable, "-c", DIGEST], cwd=request.path.parent, capture_output=True, text=True, check=True
    )
    assert there.stdout.strip() == here


def test_accumulated_gradients_give_the_masks_of_the_whole_batch() -> None:
    def masks(parts: int) -> dict[str, torch.Tensor]:
        model = make_network().double()
        optimizer = SGD(model.parameters(), lr=0.1)
        sparsifier = Sparsifier(model, optimizer, make_config("rigl", update_interval=1), total_steps=9)
        for step in range(4):
            images, classes = make_batch(step)
            for rows in torch.arange(8).chunk(parts):
                (loss_of(model, (images[rows].double(), classes[rows])) / parts).backward()
            optimizer.step()
            sparsifier.step()
            optimizer.zero_grad()
        return sparsifier.masks

    whole = masks(1)
    for parts in (4, 8):
        assert all(torch.equal(mask, whole[name]) for name, mask in masks(parts).items())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_other_precisions(dtype: torch.dtype) -> None:
    model = make_network().to(dtype)
    optimizer = OPTIMIZERS["adam"](model.parameters())
    sparsifier = Sparsifier(model, optimizer, make_config("neurotrails_llm"), total_steps=4)
    for step in range(4):
        optimizer.zero_grad()
        images, classes = make_batch(step)
        loss_of(model, (images.to(dtype), classes)).backward()
        optimizer.step()
        sparsifier.step()
    assert_exact(sparsifier, round(0.4 * sparsifier.summary().numel))


def test_channels_last_gives_the_same_masks() -> None:
    def masks(memory_format: torch.memory_format) -> dict[str, torch.Tensor]:
        model = make_network().to(memory_format=memory_format)
        optimizer = OPTIMIZERS["sgd"](model.parameters())
        sparsifier = Sparsifier(model, optimizer, make_config("set", update_interval=1), total_steps=9)
        for step in range(2):
            train_step(model, optimizer, sparsifier, step)
        assert_exact(sparsifier, round(0.4 * sparsifier.summary().numel))
        return sparsifier.masks

    contiguous = masks(torch.contiguous_format)
    assert all(torch.equal(mask, contiguous[name]) for name, mask in masks(torch.channels_last).items())


class TiedLanguageModel(nn.Module):
    """Embedding, two heads of which the first is tied to the embedding, and `get_output_layers`."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(12, 6)
        self.mix = nn.Linear(6, 6)
        self.heads = nn.ModuleList(nn.Linear(6, 12, bias=False) for _ in range(2))
        self.heads[0].weight = self.embed.weight

    def get_output_layers(self) -> list[nn.Module]:
        return list(self.heads)


def test_tied_weights_are_masked_once_under_their_first_name() -> None:
    model = TiedLanguageModel()
    sparsifier = Sparsifier(model, frozen_sgd(model), make_config("rigl"), total_steps=9)
    assert list(sparsifier.masks) == ["embed.weight", "mix.weight", "heads.1.weight"]
    assert sparsifier.summary().numel == 12 * 6 + 36 + 72


def test_dense_embeddings_spares_embeddings_and_all_output_layers() -> None:
    model = TiedLanguageModel()
    sparsifier = Sparsifier(model, frozen_sgd(model), make_config("rigl", dense_embeddings=True), total_steps=9)
    assert list(sparsifier.masks) == ["mix.weight"]
    assert (model.embed.weight != 0).all()
    assert (model.heads[1].weight != 0).all()


@pytest.mark.parametrize("head_layers", [1, 2])
def test_dense_embeddings_spares_those_of_every_ensemble_head(head_layers: int) -> None:
    shape = {"vocab_size": 20, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
    ensemble = NeuroTrailsLlamaForCausalLM(
        NeuroTrailsLlamaConfig(**shape, num_attention_heads=2, num_ensemble_heads=3, num_head_layers=head_layers)
    )
    for model in (ensemble, ensemble.extract_head(0)):
        sparsifier = Sparsifier(model, frozen_sgd(model), make_config("rigl", dense_embeddings=True), total_steps=9)
        assert sparsifier.masks
        assert not [name for name in sparsifier.masks if "lm_head" in name or "embed" in name]


@pytest.mark.parametrize("pattern", ["heads.*", "*.1.weight", "heads.[0-9].weight"])
def test_exclude_takes_shell_patterns_and_any_name_of_a_tied_weight(pattern: str) -> None:
    model = TiedLanguageModel()
    sparsifier = Sparsifier(model, frozen_sgd(model), make_config("rigl", exclude=[pattern]), total_steps=9)
    spared = ["heads.1.weight"] if pattern == "*.1.weight" else ["heads.1.weight", "embed.weight"]
    assert set(sparsifier.masks) == {"embed.weight", "mix.weight", "heads.1.weight"} - set(spared)
    assert sparsifier.density == pytest.approx(0.4, abs=0.02)


def test_names_and_masks_are_those_of_the_unwrapped_model() -> None:
    plain, wrapped = make_network(), nn.DataParallel(make_network())
    wrapped.module[5] = torch.compile(wrapped.module[5])
    masks = [
        Sparsifier(model, frozen_sgd(model), make_config("rigl"), total_steps=9).masks for model in (plain, wrapped)
    ]
    assert list(masks[0]) == list(masks[1])
    assert all(torch.equal(masks[0][name], masks[1][name]) for name in masks[0])


def test_explored_counts_every_weight_that_was_ever_active() -> None:
    model = make_network()
    optimizer = OPTIMIZERS["momentum"](model.parameters())
    sparsifier = Sparsifier(model, optimizer, make_config("rigl"), total_steps=20)
    ever = {name: mask.clone() for name, mask in sparsifier.masks.items()}
    for step in range(20):
        train_step(model, optimizer, sparsifier, step)
        for name, mask in sparsifier.masks.items():
            ever[name] |= mask
    summary = sparsifier.summary()
    for name, tensor in summary.tensors.items():
        assert tensor.explored == int(ever[name].sum()) / ever[name].numel()
    assert sum(int(mask.sum()) for mask in ever.values()) / summary.numel == summary.explored == sparsifier.explored
    assert summary.explored > summary.density


def test_clipping_counts_active_weights_only_and_scales_all_gradients_alike() -> None:
    model = make_network()
    optimizer = OPTIMIZERS["sgd"](model.parameters())
    sparsifier = Sparsifier(model, optimizer, make_config("rigl"), total_steps=9)
    loss_of(model, make_batch(0)).backward()
    before = {
        name: parameter.grad.clone() for name, parameter in model.named_parameters() if parameter.grad is not None
    }
    active = [grad[sparsifier.masks[name]] if name in sparsifier.masks else grad for name, grad in before.items()]
    expected = torch.cat([values.flatten() for values in active]).norm()
    assert expected < 0.98 * torch.cat([values.flatten() for values in before.values()]).norm()

    assert sparsifier.clip_grad_norm_(1e6).item() == pytest.approx(expected.item())
    assert all(torch.equal(p.grad, before[n]) for n, p in model.named_parameters() if p.grad is not None)
    norm = sparsifier.clip_grad_norm_(0.5 * expected.item())
    assert norm.item() == pytest.approx(expected.item())
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, 0.5 * before[name], rtol=1e-4, atol=0)
    with pytest.raises(ValueError, match="max_norm=0"):
        sparsifier.clip_grad_norm_(0)


def make(config: SparsityConfig, total_steps: int = 10, model: nn.Module | None = None) -> Sparsifier:
    model = model or make_network()
    return Sparsifier(model, Adam(model.parameters()), config, total_steps=total_steps)


def test_errors_of_construction() -> None:
    with pytest.raises(ValueError, match="total_steps=0"):
        make(make_config("rigl"), total_steps=0)
    with pytest.raises(ValueError, match="meta device"):
        make(make_config("rigl"), model=make_network().to("meta"))
    with pytest.raises(ValueError, match=r"exclude='lm_head\.\*' matches no parameter"):
        make(make_config("rigl", exclude=["lm_head.*"]))
    with pytest.raises(ValueError, match="nothing to mask"):
        make(make_config("rigl", exclude=["*"]))
    with pytest.raises(ValueError, match="density=1e-06 leaves none"):
        make(make_config("rigl", density=1e-6))
    with pytest.raises(ValueError, match="gmp would stay dense"):
        make(make_config("gmp", update_interval=100))
    model = make_network()
    with pytest.raises(ValueError, match=r"does not train 7\.weight"):
        Sparsifier(model, Adam(model[:7].parameters()), make_config("rigl"), total_steps=10)


def test_a_run_too_short_for_any_update_says_so(caplog: pytest.LogCaptureFixture) -> None:
    make(make_config("rigl", update_interval=100))
    assert "no topology update" in caplog.text
    caplog.clear()
    make(make_config("static", update_interval=100))
    assert not caplog.text


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda model: setattr(model.weights[1], "grad", None), r"weights\.1 has no gradient.*before zero_grad"),
        (lambda model: model.zero_grad(set_to_none=False) or [g.grad.zero_() for g in model.weights], "zero_grad"),
        (lambda model: model.weights[1].grad[0].fill_(math.nan), r"non-finite gradient of weights\.1"),
        (lambda model: model.weights[0].grad[1].fill_(-math.inf), r"non-finite gradient of weights\.0"),
        (lambda model: model.weights[1].data.fill_(math.nan), r"non-finite weight of weights\.1"),
    ],
)
def test_an_update_on_bad_values_is_refused_and_changes_nothing(spoil: Any, message: str) -> None:
    model = Bare((6, 6), (8, 8))
    sparsifier = Sparsifier(model, frozen_sgd(model), make_config("rigl"), total_steps=9)
    masks = {name: mask.clone() for name, mask in sparsifier.masks.items()}
    sparsifier.step()
    spoil(model)
    with pytest.raises(ValueError, match=message):
        sparsifier.step()
    assert all(torch.equal(mask, masks[name]) for name, mask in sparsifier.masks.items())


def test_growth_by_momentum_needs_momentum() -> None:
    model = make_network()
    optimizer = OPTIMIZERS["sgd"](model.parameters())
    sparsifier = Sparsifier(model, optimizer, make_config("momentum", update_interval=1), total_steps=9)
    with pytest.raises(ValueError, match=r"no momentum for 0\.weight"):
        train_step(model, optimizer, sparsifier, 0)


def test_random_growth_needs_no_gradients() -> None:
    model = Bare((6, 6))
    sparsifier = Sparsifier(model, frozen_sgd(model), make_config("set", update_interval=1), total_steps=9)
    model.zero_grad()
    assert sparsifier.step()
