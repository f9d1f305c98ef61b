"""Networks for text: their arithmetic is that of transformers, and padding and segments follow from the tokens."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel

from models.text import Bert, build
from models.torchvision_import import import_torchvision

PAD, SEPARATOR, START, FIRST, VOCABULARY = 0, 2, 1, 5, 30
SMALL = {
    "name": "bert",
    "layers": 2,
    "hidden": 12,
    "heads": 3,
    "intermediate": 20,
    "positions": 24,
    "dropout": 0.1,
}
TOLERANCE = {"rtol": 1e-10, "atol": 1e-12}


def network(classes: int = 3, seed: int = 0, pad: int = PAD, separator: int = SEPARATOR, **fields: Any) -> Bert:
    """In float64 and eval mode, with weights that are all different from where they begin."""
    torch.manual_seed(seed)
    interface = {
        "classes": [f"class {index}" for index in range(classes)],
        "length": 16,
        "vocabulary": VOCABULARY,
        "pad": pad,
        "separator": separator,
    }
    built = build({"network": {**SMALL, **fields}, "interface": interface})
    assert isinstance(built, Bert)
    with torch.no_grad():
        for parameter in built.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.3)
    return built.double().eval()


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    """Networks this small take many times as long on threads that have to wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


Samples = list[tuple[int, int | None]]


def batch(samples: Samples, width: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Tokens of texts of these lengths (of pairs: both), the mask of what is no padding, and the segments, by hand."""
    generator = np.random.default_rng(seed)
    tokens = torch.full((len(samples), width), PAD)
    present, segments = torch.zeros_like(tokens), torch.zeros_like(tokens)
    for row, (first, second) in enumerate(samples):
        ids = [START, *generator.integers(FIRST, VOCABULARY, first), SEPARATOR]
        kinds = [0] * len(ids)
        if second is not None:
            ids += [*generator.integers(FIRST, VOCABULARY, second), SEPARATOR]
            kinds += [1] * (second + 1)
        tokens[row, : len(ids)] = torch.tensor(ids)
        present[row, : len(ids)] = 1
        segments[row, : len(ids)] = torch.tensor(kinds)
    return tokens, present, segments


LENGTHS = st.lists(st.tuples(st.integers(0, 9), st.none() | st.integers(0, 9)), min_size=1, max_size=5)


@pytest.fixture(scope="module")
def both() -> tuple[Bert, Any]:
    """Ours, and that of transformers with the same weights under its own names."""
    import_torchvision()
    from transformers import BertConfig, BertForSequenceClassification

    ours = network()
    configuration = BertConfig(
        vocab_size=VOCABULARY, hidden_size=12, num_hidden_layers=2, num_attention_heads=3, intermediate_size=20,
        max_position_embeddings=24, pad_token_id=PAD, num_labels=3,
    )  # fmt: skip
    theirs = BertForSequenceClassification(configuration).double().eval()
    state = {f"bert.{key}": value for key, value in ours.encoder.state_dict().items()}
    state |= {f"classifier.{key}": value for key, value in ours.classifier.state_dict().items()}
    theirs.load_state_dict(state)
    return ours, theirs


@settings(deadline=None, max_examples=25)
@given(LENGTHS, st.integers(0, 3), st.integers(0, 99))
def test_it_is_the_network_of_transformers_told_what_is_padding_and_what_is_second(
    both: tuple[Bert, Any], samples: Samples, more: int, seed: int
) -> None:
    ours, theirs = both
    width = max(first + 2 + (0 if second is None else second + 1) for first, second in samples) + more
    tokens, present, segments = batch(samples, min(width, 24), seed)
    with torch.inference_mode():
        found = ours(tokens)
        wanted = theirs(
            tokens, attention_mask=present, token_type_ids=segments, output_hidden_states=True, return_dict=True
        )
        pooled = theirs.bert(tokens, attention_mask=present, token_type_ids=segments).pooler_output
    torch.testing.assert_close(found.logits, wanted.logits, **TOLERANCE)
    torch.testing.assert_close(found.pooled, pooled, **TOLERANCE)
    there = present.bool()
    torch.testing.assert_close(found.tokens[there], wanted.hidden_states[-1][there], **TOLERANCE)
    assert found.tokens.shape == (*tokens.shape, 12)


@settings(deadline=None, max_examples=20)
@given(LENGTHS, st.integers(1, 4), st.integers(0, 99))
def test_neither_padding_nor_company_changes_an_answer(samples: Samples, more: int, seed: int) -> None:
    tokens, present, _ = batch(samples, 21, seed)
    wide = torch.cat([tokens, torch.full((len(samples), more - 1), PAD)], 1)
    with torch.inference_mode():
        whole = NETWORK(wide)
        for row, length in enumerate(present.sum(1).tolist()):
            alone = NETWORK(tokens[row : row + 1, :length])
            torch.testing.assert_close(alone.logits[0], whole.logits[row], **TOLERANCE)
            torch.testing.assert_close(alone.tokens[0], whole.tokens[row, :length], **TOLERANCE)


NETWORK = network()


def test_second_texts_and_padding_are_seen() -> None:
    """What the two tests above would not notice: that the network looks at neither."""
    tokens, _, _ = batch([(4, 4)], 12)
    with torch.inference_mode():
        base = NETWORK(tokens).logits
        without = NETWORK(torch.where(tokens == SEPARATOR, FIRST, tokens)).logits
        swapped = NETWORK(tokens[:, [0, *range(6, 10), 5, *range(1, 5), 10, 11]]).logits
        longer = NETWORK(torch.where(tokens == PAD, FIRST, tokens)).logits
    for other in (without, swapped, longer):
        assert (base - other).abs().max() > 1e-3


def test_other_numbers_of_pad_and_separator() -> None:
    """A learnt vocabulary may number its special tokens in any way."""
    ours, moved = network(), network(pad=2, separator=0)
    tokens, _, _ = batch([(3, None), (2, 5)], 14)
    swap = torch.tensor([2, 1, 0, *range(3, VOCABULARY)])
    state = ours.state_dict()
    weights = state["encoder.embeddings.word_embeddings.weight"]
    state["encoder.embeddings.word_embeddings.weight"] = weights[swap]
    moved.load_state_dict(state)
    with torch.inference_mode():
        torch.testing.assert_close(moved(swap[tokens]).logits, ours(tokens).logits, **TOLERANCE)


# Parts and weights


def test_the_sizes_are_those_of_the_description() -> None:
    built = network(5, layers=3, intermediate=None, positions=None)
    assert built.embeddings.weight.shape == (VOCABULARY, 12)
    assert len(built.layers) == 3
    shapes = {key: tuple(value.shape) for key, value in built.state_dict().items()}
    assert shapes["encoder.embeddings.position_embeddings.weight"] == (16, 12), "the length of the data by default"
    assert shapes["encoder.encoder.layer.2.intermediate.dense.weight"] == (48, 12), "four times the width by default"
    assert shapes["classifier.weight"] == (5, 12)
    assert shapes["encoder.embeddings.token_type_embeddings.weight"] == (2, 12)
    assert built.features == {"pooled": 12}
    output = built(batch([(3, None)] * 4, 10)[0])
    assert [tuple(each.shape) for each in output] == [(4, 10, 12), (4, 12), (4, 5)]
    assert network(positions=40).state_dict()["encoder.embeddings.position_embeddings.weight"].shape == (40, 12)
    # embeddings + layers + pooling + classifier, by hand
    layer = 4 * (12 * 12 + 12) + 2 * 12 * 48 + 48 + 12 + 4 * 12
    total = (VOCABULARY + 16 + 2) * 12 + 24 + 3 * layer + 12 * 12 + 12 + 5 * 12 + 5
    assert sum(parameter.numel() for parameter in built.parameters()) == total


def test_a_zero_head_gives_every_class_the_same_probability() -> None:
    built = network()
    before = {key: value.clone() for key, value in built.state_dict().items()}
    built.zero_head()
    assert not built(batch([(3, None), (5, 2)], 12)[0]).logits.any()
    assert not [key for key, value in built.state_dict().items() if "classifier" in key and value.any()]
    assert all(torch.equal(value, before[key]) for key, value in built.state_dict().items() if "classifier" not in key)
    assert all(parameter.requires_grad for parameter in built.parameters())


def test_dropout_is_where_it_is_trained_only() -> None:
    built, tokens = network(dropout=0.5), batch([(6, None)], 8)[0]
    assert torch.equal(built(tokens).logits, built(tokens).logits)
    built.train()
    assert not torch.equal(built(tokens).logits, built(tokens).logits)
    calm = network(dropout=0.0)
    calm.load_state_dict(built.state_dict())
    torch.testing.assert_close(calm.train()(tokens).logits, built.eval()(tokens).logits, **TOLERANCE)
    built.train().encoder.eval()
    assert not torch.equal(built(tokens).logits, built(tokens).logits), "there is none before the classifier"


@pytest.mark.parametrize("prefix", ["", "bert."])
def test_every_weight_that_transformers_saves_has_one_place_here(both: tuple[Bert, Any], prefix: str) -> None:
    ours, theirs = both
    state = theirs.bert.state_dict()
    keys = [Bert.own_key(prefix + key) for key in state]
    own = {key for key in ours.state_dict() if not key.startswith("classifier.")}
    assert set(keys) == own
    assert len(keys) == len(own)
    assert all(torch.equal(ours.state_dict()[str(key)], value) for key, value in zip(keys, state.values(), strict=True))
    old = {
        f"{prefix}embeddings.LayerNorm.gamma": "encoder.embeddings.LayerNorm.weight",
        f"{prefix}encoder.layer.1.output.LayerNorm.beta": "encoder.encoder.layer.1.output.LayerNorm.bias",
    }
    assert {key: Bert.own_key(key) for key in old} == old
    assert set(old.values()) <= own
    heads = [
        "cls.predictions.bias",
        "cls.seq_relationship.weight",
        "classifier.weight",
        f"{prefix}embeddings.position_ids",
    ]
    assert {Bert.own_key(key) for key in heads} == {None}


def test_the_seed_decides_the_weights() -> None:
    def weights(seed: int) -> Tensor:
        return nn.utils.parameters_to_vector(network(seed=seed).parameters())

    assert torch.equal(weights(3), weights(3))
    assert not torch.equal(weights(3), weights(4))


# What methods do with it


def test_a_functional_call_is_the_network_with_other_weights() -> None:
    """LGTM's virtual student."""
    built, other = network(seed=1), network(seed=2)
    tokens = batch([(4, None), (3, 4)], 12)[0]
    weights = {key: value.detach().requires_grad_() for key, value in other.named_parameters()}
    found = functional_call(built, weights, (tokens,)).logits
    torch.testing.assert_close(found, other(tokens).logits, **TOLERANCE)
    gradients = torch.autograd.grad(found.square().sum(), list(weights.values()), allow_unused=True)
    expected = torch.autograd.grad(other(tokens).logits.square().sum(), list(other.parameters()), allow_unused=True)
    for one, wanted in zip(gradients, expected, strict=True):
        torch.testing.assert_close(one, wanted, **TOLERANCE)


def test_directional_derivatives_are_those_of_a_difference() -> None:
    """Forward mode goes through it, as the exact form of the influence needs."""
    built, tokens = network(), batch([(4, None), (3, 4)], 12)[0]
    torch.manual_seed(5)
    weights = {key: value.detach() for key, value in built.named_parameters()}
    direction = {key: torch.randn_like(value) for key, value in weights.items()}

    def logits(parameters: dict[str, Tensor]) -> Tensor:
        found: Tensor = functional_call(built, parameters, (tokens,)).logits
        return found

    with sdpa_kernel(SDPBackend.MATH):  # torch's faster attention has no derivative of that kind
        _, exact = torch.func.jvp(logits, (weights,), (direction,))
    step = 1e-5
    moved = [logits({key: value + sign * step * direction[key] for key, value in weights.items()}) for sign in (1, -1)]
    torch.testing.assert_close(exact, (moved[0] - moved[1]) / (2 * step), rtol=1e-5, atol=1e-6)


def test_float32_and_float64_agree() -> None:
    tokens = batch([(4, None), (3, 4)], 12)[0]
    wide, narrow = network(), network().float()
    assert wide(tokens).logits.dtype == torch.float64
    assert narrow(tokens).logits.dtype == torch.float32
    torch.testing.assert_close(narrow(tokens).logits.double(), wide(tokens).logits, rtol=1e-4, atol=1e-4)
