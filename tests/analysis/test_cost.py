# Copyright 2026 The nt_transformers authors. Licensed under the Apache License, Version 2.0.
"""FLOPs equal torch's own counter where all is dense, arithmetic by hand where it is not, and what was published."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM, LlamaConfig

from nt_transformers import NeuroTrailsLlamaConfig
from nt_transformers.analysis import (
    ModelCost,
    count_cost,
    count_nonzeros,
    image_model_cost,
    language_model_cost,
)
from nt_transformers.sparsity import Sparsifier, SparsityConfig, planned_nonzeros


SHAPE = {
    "vocab_size": 40,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
FAMILY = {
    "stock LLaMA": LlamaConfig(**SHAPE),
    "single": NeuroTrailsLlamaConfig(**SHAPE, num_ensemble_heads=1, num_head_layers=2),
    "TreeNet": NeuroTrailsLlamaConfig(**SHAPE, num_ensemble_heads=3, num_head_layers=2),
    "full ensemble": NeuroTrailsLlamaConfig(**SHAPE, num_ensemble_heads=2, num_head_layers=3),
    "tied": NeuroTrailsLlamaConfig(**SHAPE, num_ensemble_heads=2, num_head_layers=1, tie_word_embeddings=True),
}


def torch_flops(run: Callable[[], torch.Tensor]) -> tuple[int, int]:
    """Forward FLOPs, and those of forward and backward pass, by torch's counter on the real computation."""
    # The fused attention kernels of CPUs are unknown to torch's counter; this one is made of matrix products.
    with sdpa_kernel(SDPBackend.MATH):
        with FlopCounterMode(display=False) as counter:
            output = run()
        forward = counter.get_total_flops()
        with FlopCounterMode(display=False) as counter:
            output.sum().backward()
    return forward, forward + counter.get_total_flops()


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("family", FAMILY)
def test_dense_language_models_cost_what_torch_counts(family: str, attention: str) -> None:
    model = AutoModelForCausalLM.from_config(FAMILY[family], attn_implementation=attention)
    tokens = torch.zeros(1, 7, dtype=torch.long)
    forward, training = torch_flops(lambda: model(input_ids=tokens, use_cache=False).logits)
    cost = language_model_cost(model, 7)
    assert cost.forward * 7 == pytest.approx(forward, rel=1e-12)
    assert cost.training() * 7 == pytest.approx(training, rel=1e-12)
    assert cost.parameters == cost.active_parameters == model.num_parameters()


class ConvNet(nn.Module):
    """A strided convolution, a kernel that is used twice, a raw matrix, a frozen layer."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, stride=2, padding=1)
        self.twice = nn.Conv2d(8, 8, 3, padding=1)
        self.sequence = nn.Conv1d(8, 4, 5)
        self.frozen = nn.Linear(4, 6).requires_grad_(False)
        self.matrix = nn.Parameter(torch.randn(6, 5))

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        hidden = F.relu(self.stem(pixel_values))
        hidden = self.twice(self.twice(hidden))
        hidden = self.sequence(hidden.flatten(2)).transpose(1, 2)
        hidden = torch.addmm(torch.zeros(6), hidden[0], self.frozen.weight.T)
        return hidden @ self.matrix @ hidden[:5, :5].mT


def test_convolutions_and_matrices_cost_what_torch_counts() -> None:
    model = ConvNet()
    forward, training = torch_flops(lambda: model(torch.randn(1, 3, 12, 12)))
    cost = image_model_cost(model, 12)
    assert cost.forward == forward
    assert cost.training() == training


def test_grouped_convolutions_by_hand() -> None:
    # torch's counter takes a grouped kernel's gradient for that of a full kernel.
    model = nn.Conv2d(8, 12, 3, padding=1, groups=4, bias=False)
    cost = count_cost(model, {"input": torch.zeros(1, 8, 5, 6)}, items=1, nonzeros={"weight": 50})
    assert cost.parameters == 12 * 2 * 9
    assert cost.forward == pytest.approx(2 * 50 * 5 * 6)
    assert cost.training() == pytest.approx(2 * cost.forward)


def test_counting_on_the_meta_device_is_the_same_and_changes_nothing() -> None:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(FAMILY["TreeNet"])
    before = {name: value.clone() for name, value in model.state_dict().items()}
    cost = language_model_cost(model, 5)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    with torch.device("meta"):
        empty = AutoModelForCausalLM.from_config(FAMILY["TreeNet"])
    assert language_model_cost(empty, 5) == cost


def test_sparse_cost_by_hand() -> None:
    model = nn.Sequential(nn.Linear(5, 4), nn.ReLU(), nn.Linear(4, 3))
    with torch.no_grad():
        model[0].weight[:, 1:] = 0  # 4 of 20 weights stay
    cost = count_cost(model, {"input": torch.zeros(2, 5)}, items=2, nonzeros=count_nonzeros(model))
    first, second = cost.layers[0], cost.layers[2]
    assert (first.name, first.parameters, first.active) == ("0.weight", 20, 4)
    assert first.forward == 2 * 4
    # The gradient of the input is not needed: weights forward, and their gradient.
    assert first.training() == 2 * 4 + 2 * 4
    # Every eighth step the gradient of the 16 removed weights is computed as well.
    assert first.training(dense_gradient_interval=8) == 2 * 4 + 2 * 4 + 2 * 16 / 8
    assert second.training(dense_gradient_interval=8) == second.training() == 3 * 2 * 12
    assert cost.active_parameters == 4 + 4 + 12 + 3
    assert cost.dense_forward == 2 * 20 + 2 * 12


def test_masks_weights_and_plan_give_the_same_cost() -> None:
    model = AutoModelForCausalLM.from_config(FAMILY["TreeNet"])
    config = SparsityConfig(density=0.3, method="static")
    sparsifier = Sparsifier(model, torch.optim.Adam(model.parameters()), config, total_steps=1)
    with torch.device("meta"):
        empty = AutoModelForCausalLM.from_config(FAMILY["TreeNet"])
    by_masks = language_model_cost(model, 6, count_nonzeros(sparsifier.masks))
    by_plan = language_model_cost(empty, 6, planned_nonzeros(empty, config))
    by_weights = language_model_cost(model, 6, count_nonzeros(model))
    assert by_masks == by_plan == by_weights
    assert by_masks.forward < by_masks.dense_forward
    vectors = sum(parameter.numel() for parameter in model.parameters() if parameter.ndim == 1)
    assert by_masks.active_parameters == sparsifier.summary().nonzeros + vectors


def test_heads_cost_what_runs() -> None:
    model = AutoModelForCausalLM.from_config(FAMILY["TreeNet"])
    forward = []
    for heads in (1, 2, 3):
        model.active_heads = heads
        forward.append(language_model_cost(model, 4).forward)
    assert forward[1] - forward[0] == pytest.approx(forward[2] - forward[1])
    single = AutoModelForCausalLM.from_config(FAMILY["single"])
    assert forward[0] == language_model_cost(single, 4).forward


def test_a_layer_that_hides_its_weights_is_refused() -> None:
    model = nn.TransformerEncoderLayer(8, 2)
    with pytest.raises(ValueError, match="multi_head_attention_forward, called by 'self_attn'"):
        count_cost(model, {"src": torch.zeros(3, 1, 8)}, items=3)


def test_unknown_parameters_are_refused() -> None:
    with pytest.raises(ValueError, match=r"nonzeros\['weight'\]=7"):
        count_cost(nn.Linear(2, 3), {"input": torch.zeros(1, 2)}, items=1, nonzeros={"weight": 7})


class PreActivationBlock(nn.Module):
    """The block of Wide ResNet (Zagoruyko and Komodakis, 2016)."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.norms = nn.ModuleList([nn.BatchNorm2d(inputs), nn.BatchNorm2d(outputs)])
        self.first = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.second = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.shortcut = nn.Conv2d(inputs, outputs, 1, stride, bias=False) if inputs != outputs else None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = F.relu(self.norms[0](x))
        residual = x if self.shortcut is None else self.shortcut(hidden)
        return self.second(F.relu(self.norms[1](self.first(hidden)))) + residual


class Tree(nn.Module):
    def __init__(self, build: Callable[[], list[nn.Module]], shared: int, heads: int) -> None:
        super().__init__()
        self.backbone = nn.Sequential(*build()[:shared])
        self.heads = nn.ModuleList(nn.Sequential(*build()[shared:]) for _ in range(heads))

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        hidden = self.backbone(pixel_values)
        return torch.stack([head(hidden) for head in self.heads])


def wide_resnet_28_10() -> list[nn.Module]:
    """The stem, 12 blocks, and the classifier."""
    widths = [16, *[160] * 4, *[320] * 4, *[640] * 4]
    blocks = [
        PreActivationBlock(widths[i], widths[i + 1], stride=2 if i in (4, 8) else 1) for i in range(len(widths) - 1)
    ]
    head = nn.Sequential(nn.BatchNorm2d(640), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(640, 100))
    return [nn.Conv2d(3, 16, 3, 1, 1, bias=False), *blocks, head]


def resnet_50() -> list[nn.Module]:
    """The stem, 16 blocks, and the classifier."""
    net = pytest.importorskip("torchvision").models.resnet50()
    blocks = [block for layer in (net.layer1, net.layer2, net.layer3, net.layer4) for block in layer]
    stem = nn.Sequential(net.conv1, net.bn1, net.relu, net.maxpool)
    return [stem, *blocks, nn.Sequential(net.avgpool, nn.Flatten(), net.fc)]


@pytest.mark.parametrize(
    ("build", "size", "shared", "heads", "gigaflops", "megaparameters"),
    [
        (wide_resnet_28_10, 32, 5, 1, 10.49, 36.5),
        (wide_resnet_28_10, 32, 5, 3, 24.75, 106.3),
        (resnet_50, 224, 7, 1, 8.18, 25.6),
        (resnet_50, 224, 7, 3, 18.15, 74.3),
    ],
    ids=["WRN-28-10", "WRN-28-10 TreeNet", "ResNet-50", "ResNet-50 TreeNet"],
)
def test_published_costs(
    build: Any, size: int, shared: int, heads: int, gigaflops: float, megaparameters: float
) -> None:
    with torch.device("meta"):
        cost: ModelCost = image_model_cost(Tree(build, shared, heads), size)
    assert cost.forward / 1e9 == pytest.approx(gigaflops, rel=0.01)
    assert cost.parameters / 1e6 == pytest.approx(megaparameters, rel=0.01)


@pytest.mark.parametrize(
    ("heads", "head_layers", "density", "megaparameters"),
    [(1, 8, 1, 134.1), (3, 8, 1, 296.5), (3, 8, 0.9, 266.8), (3, 12, 1, 402.3)],
    ids=["single", "TreeNet", "NeuroTrails", "full ensemble"],
)
def test_published_parameters_of_llama_130m(
    heads: int, head_layers: int, density: float, megaparameters: float
) -> None:
    config = NeuroTrailsLlamaConfig(
        vocab_size=32000,
        hidden_size=768,
        intermediate_size=2048,
        num_hidden_layers=12,
        num_attention_heads=12,
        num_ensemble_heads=heads,
        num_head_layers=head_layers,
    )
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    nonzeros = planned_nonzeros(model, SparsityConfig(density=density, method="neurotrails_llm"))
    assert language_model_cost(model, 256, nonzeros).active_parameters / 1e6 == pytest.approx(
        megaparameters, rel=0.002
    )
