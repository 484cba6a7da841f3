# Copyright 2026 The nt_transformers authors. Licensed under the Apache License, Version 2.0.
"""What any causal language model can do in `generate`, against the same written out slowly, without a cache."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import (
    CompileConfig,
    DynamicCache,
    GenerationConfig,
    LogitsProcessor,
    PreTrainedModel,
    StaticCache,
)
from transformers.generation import BaseStreamer


STEPS = 5
Choice = Callable[[torch.Tensor], torch.Tensor]


def greedy(logits: torch.Tensor) -> torch.Tensor:
    return logits.argmax(-1, keepdim=True)


def sample(logits: torch.Tensor) -> torch.Tensor:
    """From the 7 likeliest tokens at temperature 0.7."""
    logits = logits / 0.7
    smallest = logits.topk(7).values[:, -1:]
    return torch.multinomial(logits.masked_fill(logits < smallest, -torch.inf).softmax(-1), 1)


@torch.no_grad()
def next_logits(model: PreTrainedModel, tokens: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
    """Logits [batch, vocab] of the next token, in float32 as `generate` returns them."""
    attention_mask = torch.nn.functional.pad(attention_mask, (0, tokens.shape[1] - attention_mask.shape[1]), value=1)
    positions = (attention_mask.cumsum(1) - 1).clamp(min=0)
    outputs = model(tokens, attention_mask=attention_mask, position_ids=positions, use_cache=False)
    return outputs.logits[:, -1].float()


def continue_by_hand(
    model: PreTrainedModel, tokens: torch.Tensor, attention_mask: torch.Tensor, choose: Choice = greedy
) -> tuple[torch.Tensor, torch.Tensor]:
    """The text with `STEPS` more tokens [batch, seq + steps] and the logits [batch, steps, vocab] they come from."""
    all_logits = []
    for _ in range(STEPS):
        all_logits.append(next_logits(model, tokens, attention_mask))
        tokens = torch.cat([tokens, choose(all_logits[-1])], 1)
    return tokens, torch.stack(all_logits, 1)


def beam_search_by_hand(
    model: PreTrainedModel, tokens: torch.Tensor, attention_mask: torch.Tensor, num_beams: int
) -> torch.Tensor:
    """The likeliest continuation of a single text that a beam of this width finds, [1, seq + steps]."""
    beams = [(0.0, tokens)]
    for _ in range(STEPS):
        candidates = []
        for score, text in beams:
            log_probs = next_logits(model, text, attention_mask)[0].log_softmax(-1)
            candidates += [
                (score + log_prob, torch.cat([text, torch.tensor([[token]])], 1))
                for token, log_prob in enumerate(log_probs.tolist())
            ]
        beams = sorted(candidates, key=lambda candidate: candidate[0], reverse=True)[:num_beams]
    return beams[0][1]


class BanFavourites(LogitsProcessor):
    """Forbids the three likeliest tokens."""

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        return scores.scatter(1, scores.topk(3).indices, -torch.inf)


class Recorder(BaseStreamer):
    def __init__(self) -> None:
        self.pieces: list[torch.Tensor] = []
        self.ended = False

    def put(self, value: torch.Tensor) -> None:
        self.pieces.append(value.reshape(-1))

    def end(self) -> None:
        self.ended = True


class _Fixtures:
    """A subclass named `Test...` overrides these as it needs and is collected."""

    @pytest.fixture
    def model(self) -> PreTrainedModel:
        """Small, in evaluation mode, without an end-of-text token. In float64: in float32 the order of summation
        alone, which differs from processor to processor, can exceed the tolerance."""
        raise NotImplementedError

    @pytest.fixture
    def num_slots(self, model: PreTrainedModel) -> int:
        """Attention layers that run, each with a place in the cache."""
        return model.config.num_hidden_layers

    @pytest.fixture
    def assistant(self) -> PreTrainedModel:
        """Another model of the same vocabulary."""
        raise NotImplementedError

    @pytest.fixture
    def text(self, tokens: torch.Tensor) -> dict[str, torch.Tensor]:
        """One text of six tokens."""
        return {"input_ids": tokens[:1, 4:], "attention_mask": torch.ones_like(tokens[:1, 4:])}

    @pytest.fixture
    def batch(self, tokens: torch.Tensor) -> dict[str, torch.Tensor]:
        """Two texts of six and ten tokens, the first padded on the left."""
        attention_mask = torch.ones_like(tokens)
        attention_mask[0, :4] = 0
        return {"input_ids": tokens.masked_fill(attention_mask == 0, 0), "attention_mask": attention_mask}

    def check(
        self, model: PreTrainedModel, inputs: dict[str, torch.Tensor], choose: Choice = greedy, **options: Any
    ) -> Any:
        torch.manual_seed(0)
        expected, expected_logits = continue_by_hand(model, *inputs.values(), choose)
        torch.manual_seed(0)
        options = {"max_new_tokens": STEPS, "do_sample": choose is sample, **options}
        outputs = model.generate(**inputs, output_logits=True, return_dict_in_generate=True, **options)
        assert torch.equal(outputs.sequences, expected)
        torch.testing.assert_close(torch.stack(outputs.logits, 1), expected_logits, rtol=1e-5, atol=1e-5)
        return outputs


class GenerationTests(_Fixtures):
    """All that takes no compiler and no thread."""

    @pytest.mark.parametrize("use_cache", [False, True])
    def test_greedy(self, model, batch, use_cache):
        self.check(model, batch, use_cache=use_cache)

    def test_sampling(self, model, batch):
        self.check(model, batch, sample, temperature=0.7, top_k=7)

    def test_beam_search(self, model, text):
        expected = beam_search_by_hand(model, *text.values(), num_beams=4)
        found = model.generate(**text, num_beams=4, max_new_tokens=STEPS, do_sample=False)
        assert torch.equal(found, expected)

    @pytest.mark.parametrize(
        "options",
        [
            {"num_beams": 3, "num_return_sequences": 2, "do_sample": False},
            {"num_beams": 3, "num_return_sequences": 2, "do_sample": True},
            {"num_return_sequences": 3, "do_sample": True, "top_p": 0.8},
        ],
        ids=["beams", "sampled beams", "samples"],
    )
    def test_several_answers_are_the_same_without_a_cache(self, model, batch, options):
        answers = []
        for use_cache in (True, False):
            torch.manual_seed(0)
            answers.append(model.generate(**batch, **options, max_new_tokens=STEPS, use_cache=use_cache))
        assert torch.equal(*answers)

    def test_assisted_by_another_model(self, model, assistant, text):
        self.check(model, text, assistant_model=assistant)

    def test_assisting_another_model(self, model, assistant, text):
        self.check(assistant, text, assistant_model=model)

    @pytest.mark.parametrize("layers", [1, 3])
    def test_assisted_by_its_own_lower_layers(self, model, text, layers):
        self.check(model, text, assistant_early_exit=layers)

    def test_prompt_lookup(self, model, text):
        text = {name: value.repeat(1, 2) for name, value in text.items()}
        self.check(model, text, prompt_lookup_num_tokens=3)

    @pytest.mark.parametrize("cache", ["dynamic", "static"])
    def test_prompt_in_chunks(self, model, batch, cache):
        self.check(model, batch, prefill_chunk_size=3, cache_implementation=cache, disable_compile=True)

    def test_static_cache(self, model, batch, num_slots):
        cache = self.check(model, batch, cache_implementation="static", disable_compile=True).past_key_values
        assert isinstance(cache, StaticCache)
        assert sum(layer.is_initialized for layer in cache.layers) == num_slots

    def test_quantized_cache(self, model, text):
        options = {"max_new_tokens": STEPS, "do_sample": False, "return_dict_in_generate": True}
        quantized = {"cache_implementation": "quantized", "cache_config": {"backend": "fp8"}}
        outputs = model.float().generate(**text, **options, **quantized, output_logits=True)
        expected = next_logits(model, outputs.sequences[:, :-1], text["attention_mask"])
        # Eight bits are not exact, but they are not another model either.
        assert torch.cosine_similarity(outputs.logits[-1], expected).min() > 0.9

    def test_padding_does_not_change_a_text(self, model, text, batch):
        options = {"max_new_tokens": STEPS, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
        alone, together = (model.generate(**inputs, **options) for inputs in (text, batch))
        assert torch.equal(together.sequences[:1, 4:], alone.sequences)
        for with_padding, without in zip(together.logits, alone.logits, strict=True):
            torch.testing.assert_close(with_padding[:1], without, rtol=1e-5, atol=1e-5)

    def test_a_cache_carries_over_to_the_next_turn(self, model, batch):
        options = {"max_new_tokens": 2, "do_sample": False, "return_dict_in_generate": True}
        first = model.generate(**batch, **options)
        turn = torch.cat([first.sequences, batch["input_ids"].flip(1)[:, :3]], 1)
        inputs = {
            "input_ids": turn,
            "attention_mask": torch.nn.functional.pad(batch["attention_mask"], (0, 5), value=1),
        }
        self.check(model, inputs, past_key_values=first.past_key_values)

    def test_prompt_in_pieces_through_the_cache(self, model, tokens, num_slots):
        whole = model(tokens).logits
        cache = DynamicCache(config=model.config)
        pieces = [
            model(piece, past_key_values=cache, use_cache=True).logits for piece in tokens.split([4, 1, 5], dim=1)
        ]
        torch.testing.assert_close(torch.cat(pieces, 1), whole, rtol=1e-5, atol=1e-5)
        assert cache.get_seq_length() == 10
        assert [layer.get_seq_length() for layer in cache.layers if layer.is_initialized] == [10] * num_slots

    def test_every_earlier_token_counts(self, model, tokens):
        cache = model(tokens[:, :-1], use_cache=True).past_key_values
        cached = model(tokens[:, -1:], past_key_values=cache).logits[:, -1]
        for position in range(9):
            changed = tokens.clone()
            changed[:, position] = changed[:, position] % 60 + 1
            other = model(changed[:, :-1], use_cache=True).past_key_values
            assert (model(changed[:, -1:], past_key_values=other).logits[:, -1] - cached).abs().max() > 1e-4

    def test_all_logits_or_the_last(self, model, batch):
        self.check(model, batch, logits_to_keep=0)

    def test_logits_processors_of_the_user(self, model, batch):
        def fourth(logits: torch.Tensor) -> torch.Tensor:
            return logits.topk(4).indices[:, -1:]

        self.check(model, batch, fourth, logits_processor=[BanFavourites()])

    def test_streaming(self, model, text):
        streamer = Recorder()
        outputs = self.check(model, text, streamer=streamer)
        assert torch.equal(torch.cat(streamer.pieces), outputs.sequences[0])
        assert len(streamer.pieces) == 1 + STEPS
        assert streamer.ended

    def test_a_text_that_ends_is_padded(self, model, batch):
        going_on = model.generate(**batch, max_new_tokens=STEPS, do_sample=False)
        end = int(going_on[0, 11])
        stopped = model.generate(**batch, max_new_tokens=STEPS, do_sample=False, eos_token_id=end, pad_token_id=0)
        for row, full in zip(stopped[:, 10:], going_on[:, 10:], strict=True):
            length = full.tolist().index(end) + 1 if end in full.tolist() else STEPS
            expected = torch.nn.functional.pad(full[:length], (0, len(row) - length))
            assert torch.equal(row, expected)

    def test_what_is_computed_on_the_way(self, model, text, num_slots):
        model.set_attn_implementation("eager")
        outputs = self.check(model, text, output_attentions=True, output_hidden_states=True, output_scores=True)
        for step in range(STEPS):
            queries = 6 if step == 0 else 1
            attentions = [attention.shape for attention in outputs.attentions[step]]
            assert attentions == [(1, model.config.num_attention_heads, queries, 6 + step)] * num_slots
            states = [state.shape for state in outputs.hidden_states[step]]
            assert states == [(1, queries, model.config.hidden_size)] * (num_slots + 1)
            assert torch.equal(outputs.scores[step], outputs.logits[step])


@pytest.mark.slow
class SlowGenerationTests(_Fixtures):
    """Compiled generation and continuous batching."""

    def test_static_cache_compiled(self, model, batch):
        compiled = CompileConfig(fullgraph=True)
        compiled._compile_all_devices = True
        torch.compiler.reset()
        self.check(model, batch, cache_implementation="static", compile_config=compiled)
        self.check(model, batch, cache_implementation="static", compile_config=compiled)

    def test_a_batch_that_requests_join_and_leave(self, model, batch):
        model = model.float()
        requests = [row[mask.bool()].tolist() for row, mask in zip(*batch.values(), strict=True)]
        config = GenerationConfig(
            max_new_tokens=STEPS, do_sample=False, eos_token_id=-1, pad_token_id=0, num_blocks=16, max_batch_tokens=32
        )
        answers = model.generate_batch([*requests, *requests], generation_config=config, progress_bar=False)
        for request, answer in zip([*requests, *requests], answers.values(), strict=True):
            tokens = torch.tensor([request])
            expected, _ = continue_by_hand(model, tokens, torch.ones_like(tokens))
            assert answer.generated_tokens == expected[0, len(request) :].tolist()
